"""The metrics of one class in one case, and what empty masks mean: decided here, once, for every report.

Policy: a class that is absent in reference and prediction says nothing about overlap and distance, so the case is left
out of the class's means and counted; a class that is in only one of the two has Dice 0, Jaccard 0, surface Dice 0,
volume similarity 0 and the image's diagonal as its distances, and is counted too. No library is asked about an empty
mask: they crash, raise, or return what improves the mean.

A class that the reference does not annotate, as dataset.json says, says nothing either: it is left out of everything
and counted.

Lesions are counted over all cases: the sensitivity of a class is lesions found / lesions there, and a case without
lesions, where nothing was predicted either, has zero false positives.

nnU-Net's summary.json comes to the same class means of Dice and Jaccard (it writes NaN where both are empty and leaves
NaN out), but it counts neither, and its `foreground_mean` is NaN as soon as one class is absent from every case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lgssl_nnunet.evaluation.lesions import LesionCounts
from lgssl_nnunet.evaluation.surfaces import MEDPY_COLUMNS, SURFACE_COLUMNS

MEASURED = "measured"
BOTH_EMPTY = "both empty"
REFERENCE_EMPTY = "reference empty"
PREDICTION_EMPTY = "prediction empty"
NOT_ANNOTATED = "not annotated"

# What is averaged over the cases in which a class counts, in the order of the tables.
AVERAGED = ("dice", "jaccard", "volume_similarity", *SURFACE_COLUMNS, *MEDPY_COLUMNS)

POLICY = (
    "Empty masks: classes absent in reference and prediction are left out of the mean and counted as 'both empty'; "
    "classes present in only one of them have Dice, Jaccard, surface Dice and volume similarity 0 and the image's "
    "diagonal as distance, and are counted as 'one empty'."
)

NOT_ANNOTATED_POLICY = (
    "Not annotated: classes that dataset.json does not name as annotated in a case are not measured in it; the case is "
    "left out of their means."
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
        n_reference: voxels of the class in the reference; None where it does not annotate the class.
        n_prediction: voxels of the class in the prediction; None as well there.
        status: MEASURED, BOTH_EMPTY, REFERENCE_EMPTY, PREDICTION_EMPTY, or NOT_ANNOTATED: then nothing was measured.
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
    n_reference: int | None
    n_prediction: int | None
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
    """One class over all cases.

    The metrics are means over the cases in which the class counts: NaN if there are none, None if not measured.

    Attributes:
        key: label or region as in summary.json.
        name: the class's name in dataset.json.
        dice: mean Dice coefficient.
        jaccard: mean Jaccard index.
        cases: cases in which the class counts, those with one empty mask included.
        both_empty: cases left out because both masks are empty.
        one_empty: cases in which one of the masks is empty.
        not_annotated: cases left out because their reference does not annotate the class; None if there are none.
        volume_similarity: mean volume similarity.
        hd95: mean 95 % Hausdorff distance in mm.
        assd: mean average symmetric surface distance in mm.
        surface_dice: mean surface Dice.
        hd95_medpy: mean of MedPy's 95 % Hausdorff distance in mm.
        asd_medpy: mean of MedPy's average surface distance in mm.
        lesions: lesions in the references of all cases; None unless the class is made of lesions.
        lesions_found: how many of them the predictions touch.
        lesion_sensitivity: lesions_found / lesions, NaN without lesions.
        lesion_false_positives: predicted lesions that touch no lesion, mean per case over all cases.
    """

    key: str
    name: str
    dice: float
    jaccard: float
    cases: int
    both_empty: int
    one_empty: int
    not_annotated: int | None = None
    volume_similarity: float = math.nan
    hd95: float | None = None
    assd: float | None = None
    surface_dice: float | None = None
    hd95_medpy: float | None = None
    asd_medpy: float | None = None
    lesions: int | None = None
    lesions_found: int | None = None
    lesion_sensitivity: float | None = None
    lesion_false_positives: float | None = None


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


def not_annotated(case: str, key: str, name: str) -> ClassResult:
    """Return the result of a class that the reference does not annotate; arguments as for `class_result`."""
    return ClassResult(case, key, name, math.nan, math.nan, None, None, NOT_ANNOTATED, math.nan)


def with_surfaces(
    result: ClassResult,
    columns: Sequence[str],
    measure: Callable[[], Mapping[str, float]],
    diagonal: float,
) -> ClassResult:
    """Return the result with its surface columns filled, with the empty-mask policy applied.

    Args:
        result: overlap of the class.
        columns: the surface columns that can be measured.
        measure: returns them; called only if both masks hold something.
        diagonal: diagonal of the image in mm.
    """
    if result.status == MEASURED:
        return replace(result, **measure())
    if result.status == BOTH_EMPTY:
        return replace(result, **dict.fromkeys(columns, math.nan))
    return replace(result, **{column: 0.0 if column == "surface_dice" else diagonal for column in columns})


def with_lesions(result: ClassResult, lesions: LesionCounts) -> ClassResult:
    """Return the result with its lesion columns filled; without lesions in the reference there is no sensitivity."""
    return replace(
        result,
        lesions_reference=lesions.reference,
        lesions_prediction=lesions.prediction,
        lesions_found=lesions.found,
        lesion_sensitivity=lesions.found / lesions.reference if lesions.reference else math.nan,
        lesion_false_positives=lesions.false_positives,
    )


def class_means(results: Sequence[ClassResult]) -> list[ClassMean]:
    """Return the mean of each class over its cases, in the order in which the classes first appear."""
    classes = list(dict.fromkeys((result.key, result.name) for result in results))
    return [_class_mean([r for r in results if (r.key, r.name) == (key, name)]) for key, name in classes]


def foreground_mean(means: Sequence[ClassMean]) -> dict[str, float]:
    """Return the mean of each metric over the classes that were measured at all (NaN if none was).

    Metrics that no class has are left out.
    """
    values = {
        metric: [getattr(mean, metric) for mean in means if mean.cases and getattr(mean, metric) is not None]
        for metric in AVERAGED
    }
    return {metric: _mean(of) for metric, of in values.items() if of or metric in ("dice", "jaccard")}


def _status(reference: int, prediction: int) -> str:
    if reference and prediction:
        return MEASURED
    if reference:
        return PREDICTION_EMPTY
    return REFERENCE_EMPTY if prediction else BOTH_EMPTY


def _class_mean(every_result: Sequence[ClassResult]) -> ClassMean:
    results = [result for result in every_result if result.status != NOT_ANNOTATED]
    key, name, left_out = every_result[0].key, every_result[0].name, len(every_result) - len(results)
    if not results:
        return ClassMean(key, name, math.nan, math.nan, 0, 0, 0, left_out)
    counted = [result for result in results if result.status != BOTH_EMPTY]
    return ClassMean(
        key=key,
        name=name,
        cases=len(counted),
        both_empty=len(results) - len(counted),
        one_empty=sum(result.status in (REFERENCE_EMPTY, PREDICTION_EMPTY) for result in counted),
        not_annotated=left_out or None,
        **{
            metric: _mean([getattr(result, metric) for result in counted])
            for metric in AVERAGED
            if getattr(results[0], metric) is not None
        },
        **_lesion_means(results),
    )


def _lesion_means(results: Sequence[ClassResult]) -> dict[str, float]:
    if results[0].lesions_reference is None:
        return {}
    lesions = sum(result.lesions_reference for result in results)
    found = sum(result.lesions_found for result in results)
    return {
        "lesions": lesions,
        "lesions_found": found,
        "lesion_sensitivity": found / lesions if lesions else math.nan,
        "lesion_false_positives": _mean([result.lesion_false_positives for result in results]),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
