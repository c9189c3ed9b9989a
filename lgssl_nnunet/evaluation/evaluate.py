"""Compare a folder of segmentations with their references: the function behind `lgssl_evaluate`."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import (
    compute_metrics,
    label_or_region_to_key,
    save_summary_json,
)
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from lgssl_nnunet.errors import DatasetError, PlansError
from lgssl_nnunet.evaluation.metrics import ClassResult, class_means, class_result, foreground_mean
from lgssl_nnunet.files import write_atomically
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.plans.cases import find_reader

logger = logging.getLogger(__name__)

LabelOrRegion = int | tuple[int, ...]
DEFAULT_WORKERS = min(8, os.cpu_count() or 1)


def evaluate(
    reference: str | Path,
    prediction: str | Path,
    *,
    dataset_json: str | Path | Mapping[str, Any] | None = None,
    plans: str | Path | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    num_processes: int = DEFAULT_WORKERS,
    chill: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Compute Dice and Jaccard per class and case, and write nnU-Net's summary.json and a table per case.

    With worker processes a script needs the usual `if __name__ == "__main__":` around its code.

    Args:
        reference: folder with the reference segmentations.
        prediction: folder with the predicted segmentations, under the same file names.
        dataset_json: the dataset's description; by default the one that prediction left in `prediction`.
        plans: the plans; by default those in `prediction`, and without any nnU-Net's usual reading of the labels.
        output: the summary, ending in .json; by default `prediction`/summary.json. The table per case is written
            beside it, with `_per_case.csv` instead of `.json`.
        num_processes: worker processes; 0 does the work in this process.
        chill: evaluate the cases that are there instead of refusing when predictions are missing.
        progress: show a bar over the cases (only on a terminal).

    Returns:
        `summary` (what is in summary.json), `cases` (`ClassResult` of each class and case), `classes` (`ClassMean` of
        each class), `dice` and `jaccard` (means over the classes), `summary_file` and `cases_file`.

    Raises:
        DatasetError: missing predictions or references (all named), or segmentations that do not match.
        PlansError: dataset.json or plans.json is missing or unreadable.
    """
    reference, prediction = Path(reference).expanduser(), Path(prediction).expanduser()
    summary_file = Path(output).expanduser() if output else prediction / "summary.json"
    if summary_file.suffix != ".json":
        raise DatasetError(f"-o {summary_file}: the summary is JSON; give a file that ends in .json.")
    dataset = _read_description(dataset_json, prediction, "dataset.json", "-djfile")
    labels = _label_manager(plans, dataset, prediction)
    names = _class_names(labels)
    files = _matching_files(reference, prediction, dataset["file_ending"], chill)
    reader = find_reader(dataset, reference / files[0])
    tasks = {name: (reference / name, prediction / name, reader, labels, list(names)) for name in files}
    bar = progress and sys.stderr.isatty()
    measured = dict(run_cases(_measure, tasks, num_processes=num_processes, description="Evaluating", progress=bar))
    _raise_failures({name: result for name, result in measured.items() if isinstance(result, CaseFailure)})
    summary = _summary([measured[name] for name in files], list(names))
    return _write(summary, _results(summary, names, dataset["file_ending"]), summary_file)


@dataclass
class _CheckedReader:
    """A reader that refuses unknown labels and two segmentations of different shape.

    nnU-Net's metric function reads reference and prediction through it, so each file is read once.
    """

    reader: BaseReaderWriter
    allowed: frozenset[int]
    reference: tuple[Path, tuple[int, ...]] | None = None

    def read_seg(self, file: str) -> tuple[np.ndarray, dict]:
        """Return a segmentation (1, X, Y, Z) and its properties."""
        try:
            segmentation, properties = self.reader.read_seg(file)
        except Exception as error:
            raise DatasetError(f"{file} cannot be read ({' '.join(str(error).split())[:200]})") from error
        unknown = sorted(set(pd.unique(segmentation.ravel()).tolist()) - self.allowed)
        if unknown:
            raise DatasetError(f"{file} holds labels that dataset.json does not know: {unknown[:5]}")
        if self.reference is None:
            self.reference = (Path(file), segmentation.shape)
        elif segmentation.shape != self.reference[1]:
            shapes = [" x ".join(map(str, shape[1:])) for shape in (segmentation.shape, self.reference[1])]
            raise DatasetError(f"{file} has {shapes[0]} voxels and {self.reference[0]} has {shapes[1]}")
        return segmentation, properties


def _measure(
    reference: Path,
    prediction: Path,
    reader: type[BaseReaderWriter],
    labels: LabelManager,
    classes: list[LabelOrRegion],
) -> dict[str, Any]:
    """Return nnU-Net's metrics of one case; runs in a worker process or in this one."""
    known = [*labels.all_labels, *([labels.ignore_label] if labels.has_ignore_label else [])]
    checked = _CheckedReader(reader(), frozenset(known))
    return compute_metrics(str(reference), str(prediction), checked, classes, labels.ignore_label)


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
    foreground = {metric: np.mean([mean[key][metric] for key in classes]) for metric in metrics}
    summary = {"metric_per_case": per_case, "mean": mean, "foreground_mean": foreground}
    for part in (*per_case, mean, foreground):
        recursive_fix_for_json_export(part)
    return summary


def _results(summary: Mapping[str, Any], names: Mapping[LabelOrRegion, str], file_ending: str) -> list[ClassResult]:
    return [
        class_result(
            Path(case["prediction_file"]).name.removesuffix(file_ending),
            label_or_region_to_key(key),
            name,
            int(case["metrics"][key]["TP"]),
            int(case["metrics"][key]["FP"]),
            int(case["metrics"][key]["FN"]),
        )
        for case in summary["metric_per_case"]
        for key, name in names.items()
    ]


def _write(summary: dict[str, Any], results: list[ClassResult], summary_file: Path) -> dict[str, Any]:
    """Write the summary and the table per case beside it, and return what `evaluate` returns."""
    cases_file = summary_file.with_name(f"{summary_file.stem}_per_case.csv")
    write_atomically(summary_file, lambda temporary: save_summary_json(summary, str(temporary)))
    write_atomically(cases_file, lambda temporary: _write_table(results, temporary))
    means = class_means(results)
    dice, jaccard = foreground_mean(means)
    return {
        "summary": summary,
        "cases": results,
        "classes": means,
        "dice": dice,
        "jaccard": jaccard,
        "summary_file": summary_file,
        "cases_file": cases_file,
    }


def _write_table(results: Sequence[ClassResult], file: Path) -> None:
    rows = [asdict(result) for result in results]
    measured = [field.name for field in fields(ClassResult) if any(row[field.name] is not None for row in rows)]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, measured, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _matching_files(reference: Path, prediction: Path, file_ending: str, chill: bool) -> list[str]:
    """Return the file names to compare, in nnU-Net's order.

    Raises:
        DatasetError: predictions are missing, all named (with `chill` only if all are), or nothing has a reference.
    """
    for folder in (reference, prediction):
        if not folder.is_dir():
            raise DatasetError(f"{folder} is no folder; give the folders of references and predictions.")
    references, predictions = (_segmentations(folder, file_ending) for folder in (reference, prediction))
    missing = [name for name in references if name not in predictions]
    surplus = [name for name in predictions if name not in references]
    both = [name for name in predictions if name in references]
    if not references or not both:
        found = f"{len(references)} file(s) end in {file_ending} in {reference} and {len(predictions)} in {prediction}"
        raise DatasetError(f"There is nothing to compare: {found}, and no name is in both.")
    if missing and not chill:
        raise DatasetError(
            f"{prediction} lacks {len(missing)} of {len(references)} cases: {', '.join(missing)}; predict them, or add "
            "--chill to evaluate the others."
        )
    if missing:
        logger.warning("No prediction for %d of %d cases: %s", len(missing), len(references), ", ".join(missing))
    if surplus:
        logger.warning("No reference for %d predictions, left out: %s", len(surplus), ", ".join(surplus))
    return both


def _segmentations(folder: Path, file_ending: str) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.name.endswith(file_ending))


def _raise_failures(failures: Mapping[str, CaseFailure]) -> None:
    if failures:
        listing = "\n".join(f"  {failure.reason}" for failure in failures.values())
        raise DatasetError(f"{len(failures)} case(s) cannot be compared:\n{listing}")


def _label_manager(
    plans: str | Path | Mapping[str, Any] | None, dataset: Mapping[str, Any], prediction: Path
) -> LabelManager:
    """Return nnU-Net's reading of the labels, which the plans may change."""
    if "labels" not in dataset or "file_ending" not in dataset:
        raise PlansError("dataset.json needs the entries labels and file_ending; take the one of the raw dataset.")
    if plans is None and not (prediction / "plans.json").is_file():
        return LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    return PlansManager(_read_description(plans, prediction, "plans.json", "-pfile")).get_label_manager(dataset)


def _class_names(labels: LabelManager) -> dict[LabelOrRegion, str]:
    """Return the foreground classes as nnU-Net evaluates them, with their names in dataset.json."""
    classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    names = {_members(value): name for name, value in labels.label_dict.items() if name != "ignore"}
    return {
        (tuple(key) if isinstance(key, (tuple, list)) else int(key)): names.get(_members(key), str(key))
        for key in classes
    }


def _members(label_or_region: int | Sequence[int]) -> frozenset[int]:
    return frozenset(int(label) for label in np.atleast_1d(label_or_region))


def _read_description(
    source: str | Path | Mapping[str, Any] | None, folder: Path, name: str, flag: str
) -> dict[str, Any]:
    """Return a description given as such, as a file, or lying in `folder`."""
    if isinstance(source, Mapping):
        return dict(source)
    file = Path(source).expanduser() if source else folder / name
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlansError(f"{file} is missing; name it with {flag}.") from error
    except ValueError as error:
        raise PlansError(f"{file} is not readable as JSON ({error}); name another with {flag}.") from error
