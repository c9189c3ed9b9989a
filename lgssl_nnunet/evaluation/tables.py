"""Evaluation results as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lgssl_nnunet.evaluation.metrics import NOT_ANNOTATED_POLICY, POLICY, ClassMean, foreground_mean

_METRICS = {
    "dice": "Dice",
    "jaccard": "Jaccard",
    "volume_similarity": "VolSim",
    "hd95": "HD95",
    "assd": "ASSD",
    "surface_dice": "SurfDice",
    "hd95_medpy": "HD95(MedPy)",
    "asd_medpy": "ASD(MedPy)",
}
_LENGTHS = ("hd95", "assd", "hd95_medpy", "asd_medpy")
_COUNTS = {"cases": "cases", "both_empty": "both empty", "one_empty": "one empty"}
_NOT_ANNOTATED = {"not_annotated": "not annotated"}
_LESIONS = {
    "lesions": "lesions",
    "lesions_found": "found",
    "lesion_sensitivity": "sensitivity",
    "lesion_false_positives": "false positives per case",
}


def class_table(means: Sequence[ClassMean], tolerance: float | None = None) -> str:
    """Return a table with a line per class and the mean over classes, a table of lesions, and what they mean.

    Args:
        means: the classes.
        tolerance: tolerance of the surface Dice in mm, for the explanation.
    """
    parts = [_metric_table(means)]
    if any(mean.lesions is not None for mean in means):
        parts.append(_lesion_table([mean for mean in means if mean.lesions is not None]))
    return "\n\n".join([*parts, "\n".join(_explanations(means, tolerance))])


def _metric_table(means: Sequence[ClassMean]) -> str:
    shown = [metric for metric in _METRICS if any(getattr(mean, metric) is not None for mean in means)]
    average = foreground_mean(means)
    counts = _COUNTS | (_NOT_ANNOTATED if any(mean.not_annotated for mean in means) else {})
    rows = [
        (
            m.name,
            m.key,
            *(_cell(metric, getattr(m, metric)) for metric in shown),
            *(str(getattr(m, c) or 0) for c in counts),
        )
        for m in means
    ]
    rows.append(("mean", "", *(_cell(metric, average.get(metric)) for metric in shown), *("" for _ in counts)))
    return _aligned([("class", "label", *(_METRICS[metric] for metric in shown), *counts.values()), *rows])


def _lesion_table(means: Sequence[ClassMean]) -> str:
    rows = [(m.name, m.key, *(_cell(column, getattr(m, column)) for column in _LESIONS)) for m in means]
    return _aligned([("lesions of", "label", *_LESIONS.values()), *rows])


def _explanations(means: Sequence[ClassMean], tolerance: float | None) -> list[str]:
    lines = [POLICY]
    if any(mean.not_annotated for mean in means):
        lines.append(NOT_ANNOTATED_POLICY)
    if any(mean.hd95 is not None or mean.hd95_medpy is not None for mean in means):
        within = "" if tolerance is None else f"; SurfDice is at a tolerance of {tolerance:g} mm"
        lines.append(f"Distances are in mm{within}.")
    if any(mean.lesions is not None for mean in means):
        lines.append(
            "Lesions are connected components (26 neighbours), found when one voxel is predicted; sensitivity is over "
            "the lesions of all cases, false positives are the mean over all cases."
        )
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of which is the header, as columns: two of names, the others of numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    names = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
    numbers = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(names + numbers).rstrip()


def _cell(column: str, value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if column in (*_LENGTHS, "lesion_false_positives") else f"{value:.4f}"
