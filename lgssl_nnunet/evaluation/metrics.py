"""Overlap metrics of one class in one case, and what empty masks mean: decided here, once, for every report.

Policy: a class that is absent in reference and prediction says nothing about overlap, so the case is left out of
the class's mean and counted; a class that is in only one of the two has Dice 0 and Jaccard 0, and is counted too.

nnU-Net's summary.json comes to the same class means (it writes NaN where both are empty and leaves NaN out), but it
counts neither, and its `foreground_mean` is NaN as soon as one class is absent from every case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MEASURED = "measured"
BOTH_EMPTY = "both empty"
REFERENCE_EMPTY = "reference empty"
PREDICTION_EMPTY = "prediction empty"

POLICY = (
    "Classes absent in reference and prediction are left out of the mean and counted as 'both empty'; "
    "classes present in only one of them have Dice 0 and are counted as 'one empty'."
)


@dataclass(frozen=True)
class ClassResult:
    """One class of one case.

    Attributes:
        case: case id.
        key: label or region as in summary.json, for example "1" or "(1, 2)".
        name: the class's name in dataset.json.
        dice: Dice coefficient from 0 to 1, NaN where both masks are empty.
        jaccard: Jaccard index (intersection over union) from 0 to 1, NaN where both masks are empty.
        n_reference: voxels of the class in the reference.
        n_prediction: voxels of the class in the prediction.
        status: MEASURED, BOTH_EMPTY, REFERENCE_EMPTY or PREDICTION_EMPTY.
        volume_similarity: 1 - |a - b| / (a + b) of the two volumes, NaN where both masks are empty.
        hd95: 95 % Hausdorff distance in mm (the larger of the two directions).
        assd: average symmetric surface distance in mm.
        surface_dice: part of both surfaces that lies within the tolerance of the other, from 0 to 1.
        hd95_medpy: MedPy's 95 % Hausdorff distance in mm (both directions pooled).
        asd_medpy: MedPy's average surface distance in mm, from the prediction to the reference only.
        lesions_reference: lesions (connected components) of the reference; lesion columns are for lesion classes only.
        lesions_prediction: lesions of the prediction.
        lesions_found: lesions of the reference that the prediction touches.
        lesion_sensitivity: lesions_found / lesions_reference, NaN without lesions.
        lesion_false_positives: lesions of the prediction that touch none of the reference.

    Surface and lesion columns are None where they were not measured (the library is missing, no lesion class); a column
    that was measured nowhere is not in the CSV.
    """

    case: str
    key: str
    name: str
    dice: float
    jaccard: float
    n_reference: int
    n_prediction: int
    status: str
    volume_similarity: float
    hd95: float | None = None
    assd: float | None = None
    surface_dice: float | None = None
    hd95_medpy: float | None = None
    asd_medpy: float | None = None
    lesions_reference: int | None = None
    lesions_prediction: int | None = None
    lesions_found: int | None = None
    lesion_sensitivity: float | None = None
    lesion_false_positives: int | None = None


@dataclass(frozen=True)
class ClassMean:
    """One class over all cases: means over the cases in which it counts (NaN if none), and how many they are."""

    key: str
    name: str
    dice: float
    jaccard: float
    cases: int
    both_empty: int
    one_empty: int


def class_result(case: str, key: str, name: str, true_pos: int, false_pos: int, false_neg: int) -> ClassResult:
    """Return the metrics of one class from its voxel counts, with the empty-mask policy applied.

    Args:
        case: case id.
        key: label or region as text.
        name: class name.
        true_pos: voxels of the class in both masks.
        false_pos: voxels in the prediction only.
        false_neg: voxels in the reference only.
    """
    reference, prediction = true_pos + false_neg, true_pos + false_pos
    union = true_pos + false_pos + false_neg
    status = _status(reference, prediction)
    dice = 2 * true_pos / (reference + prediction) if union else math.nan
    jaccard = true_pos / union if union else math.nan
    volumes = 1 - abs(reference - prediction) / (reference + prediction) if union else math.nan
    return ClassResult(case, key, name, dice, jaccard, reference, prediction, status, volumes)


def class_means(results: Sequence[ClassResult]) -> list[ClassMean]:
    """Return the mean of each class over its cases, in the order in which the classes first appear."""
    classes = list(dict.fromkeys((result.key, result.name) for result in results))
    return [_class_mean([r for r in results if (r.key, r.name) == (key, name)]) for key, name in classes]


def foreground_mean(means: Sequence[ClassMean]) -> tuple[float, float]:
    """Return mean Dice and mean Jaccard over the classes that were measured at all; NaN if none was."""
    measured = [mean for mean in means if mean.cases]
    return _mean([mean.dice for mean in measured]), _mean([mean.jaccard for mean in measured])


def _status(reference: int, prediction: int) -> str:
    if reference and prediction:
        return MEASURED
    if reference:
        return PREDICTION_EMPTY
    return REFERENCE_EMPTY if prediction else BOTH_EMPTY


def _class_mean(results: Sequence[ClassResult]) -> ClassMean:
    counted = [result for result in results if result.status != BOTH_EMPTY]
    return ClassMean(
        key=results[0].key,
        name=results[0].name,
        dice=_mean([result.dice for result in counted]),
        jaccard=_mean([result.jaccard for result in counted]),
        cases=len(counted),
        both_empty=len(results) - len(counted),
        one_empty=sum(result.status in (REFERENCE_EMPTY, PREDICTION_EMPTY) for result in counted),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
