"""What an evaluation leaves behind: nnU-Net's summary.json, the table per case and the means per class."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import save_summary_json
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from lgssl_nnunet.evaluation.case import CaseMeasurement, CaseSettings, LabelOrRegion
from lgssl_nnunet.evaluation.metrics import (
    NOT_ANNOTATED,
    NOT_ANNOTATED_POLICY,
    POLICY,
    ClassMean,
    ClassResult,
    class_means,
    foreground_mean,
)
from lgssl_nnunet.files import write_atomically, write_json
from lgssl_nnunet.installation import installed_version
from lgssl_nnunet.locks import hold_lock

_LIBRARIES = ("nnunetv2", "surface-distance", "MedPy", "connected-components-3d")


def write_results(cases: Sequence[CaseMeasurement], settings: CaseSettings, summary_file: Path) -> dict[str, Any]:
    """Write the summary, and beside it the table per case and the means per class; return what `evaluate` returns.

    summary.json holds what nnU-Net writes and nothing else: its commands read it.
    """
    cases_file, classes_file = (
        summary_file.with_name(f"{summary_file.stem}_{ending}") for ending in ("per_case.csv", "per_class.json")
    )
    results = [result for case in cases for result in case.results]
    summary = _summary([case.summary for case in cases], list(settings.names))
    classes = class_means(results)
    means = foreground_mean(classes)
    # Of two evaluations that end together the last one writes all three files.
    with hold_lock(summary_file.with_name(f".{summary_file.name}.lock"), summary_file, wait=True):
        write_atomically(summary_file, lambda temporary: save_summary_json(summary, str(temporary)))
        write_atomically(cases_file, lambda temporary: _write_table(results, temporary))
        write_json(_class_summary(classes, means, settings, len(cases)), classes_file)
    return {
        "summary": summary,
        "cases": results,
        "classes": classes,
        "means": means,
        "dice": means["dice"],
        "jaccard": means["jaccard"],
        "tolerance": settings.tolerance,
        "summary_file": summary_file,
        "cases_file": cases_file,
        "classes_file": classes_file,
    }


def _summary(per_case: list[dict[str, Any]], classes: Sequence[LabelOrRegion]) -> dict[str, Any]:
    """Return what nnU-Net puts into summary.json: each case, the mean per class, the mean over classes."""
    metrics = list(per_case[0]["metrics"][classes[0]])
    with warnings.catch_warnings():
        # A class that is absent everywhere has no mean; NaN says so.
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        mean = {
            key: {metric: np.nanmean([case["metrics"][key][metric] for case in per_case]) for metric in metrics}
            for key in classes
        }
    annotated = [key for key in classes if not np.isnan(mean[key]["TP"])]  # by at least one case
    foreground = {metric: np.mean([mean[key][metric] for key in annotated]) for metric in metrics}
    summary = {"metric_per_case": per_case, "mean": mean, "foreground_mean": foreground}
    for part in (*per_case, mean, foreground):
        recursive_fix_for_json_export(part)
    return summary


def _class_summary(
    classes: Sequence[ClassMean], means: dict[str, float], settings: CaseSettings, number_of_cases: int
) -> dict[str, Any]:
    return {
        "cases": number_of_cases,
        "tolerance_mm": settings.tolerance,
        "lesion_classes": [name for name in settings.names.values() if name in settings.lesion_classes],
        "empty_masks": POLICY,
        **({"not_annotated": NOT_ANNOTATED_POLICY} if any(mean.not_annotated for mean in classes) else {}),
        "versions": {name: installed_version(name) for name in _LIBRARIES},
        "classes": [_without_nan(_measured(asdict(mean))) for mean in classes],
        "mean": _without_nan(means),
    }


def _measured(columns: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if value is not None}


def _without_nan(columns: dict[str, Any]) -> dict[str, Any]:
    """Write null where there is nothing to average: NaN is no JSON."""
    return {n: None if isinstance(value, float) and math.isnan(value) else value for n, value in columns.items()}


def _write_table(results: Sequence[ClassResult], file: Path) -> None:
    rows = [_annotated_columns(result) for result in results]
    measured = [field.name for field in fields(ClassResult) if any(row[field.name] is not None for row in rows)]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, measured, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _annotated_columns(result: ClassResult) -> dict[str, Any]:
    """Leave the fields of a class empty that the reference does not annotate: NaN is for what has no value."""
    columns = asdict(result)
    if result.status != NOT_ANNOTATED:
        return columns
    return {name: columns[name] if isinstance(columns[name], str) else None for name in columns}
