"""Everything that is measured in one case, with each of its two files read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.evaluation.evaluate_predictions import (
    compute_metrics,
    label_or_region_to_key,
    region_or_label_to_mask,
)
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from lgssl_nnunet.data.partial_labels import PartialLabel
from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.dataset_conversion.volumes import last_line, require_whole
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.evaluation.lesions import count_lesions
from lgssl_nnunet.evaluation.metrics import ClassResult, class_result, not_annotated, with_lesions, with_surfaces
from lgssl_nnunet.evaluation.surfaces import image_diagonal, surface_metrics

LabelOrRegion = int | tuple[int, ...]


@dataclass(frozen=True)
class CaseSettings:
    """What is measured in every case.

    Attributes:
        reader: nnU-Net's reader of the files.
        labels: nnU-Net's reading of dataset.json.
        names: name of each class (label or region).
        surface_columns: the surface columns to measure; empty for none.
        tolerance: tolerance of the surface Dice in mm.
        lesion_classes: names of the classes whose lesions are counted.
    """

    reader: type[BaseReaderWriter]
    labels: LabelManager
    names: Mapping[LabelOrRegion, str]
    surface_columns: tuple[str, ...]
    tolerance: float
    lesion_classes: frozenset[str]


@dataclass(frozen=True)
class CaseMeasurement:
    """What was measured in one case.

    Attributes:
        summary: the case's entry in nnU-Net's summary.json.
        results: one result per class.
        ignored: voxels that the reference ignores.
        spacings: voxel size in mm of reference and prediction, in the order of the array's axes.
    """

    summary: dict[str, Any]
    results: list[ClassResult]
    ignored: int
    spacings: tuple[tuple[float, ...], tuple[float, ...]]


def measure_case(
    case: str, reference: Path, prediction: Path, settings: CaseSettings, partial: PartialLabel | None = None
) -> CaseMeasurement:
    """Measure one case; runs in a worker process or in the calling one.

    Counts, surfaces and lesions are those of the voxels that the reference does not ignore: ignored voxels are cut out
    of both masks. Distances are in the reference's geometry.

    Args:
        case: case id.
        reference: reference segmentation.
        prediction: predicted segmentation.
        settings: what to measure.
        partial: of a reference that annotates only some of the classes; the others are not measured.

    Raises:
        DatasetError: a file cannot be read, holds unknown labels, or the two have different shapes.
    """
    labels = settings.labels
    known = [*labels.all_labels, *([labels.ignore_label] if labels.has_ignore_label else [])]
    reader = _CheckedReader(settings.reader(), frozenset(known))
    summary = compute_metrics(str(reference), str(prediction), reader, list(settings.names), labels.ignore_label)
    segmentations, spacings = [r.voxels for r in reader.read], tuple(r.spacing for r in reader.read)
    counted = segmentations[0][0] != labels.ignore_label if labels.has_ignore_label else None
    results = []
    for key, name in settings.names.items():
        if partial is not None and partial.hides(key):
            summary["metrics"][key] = dict.fromkeys(summary["metrics"][key], np.nan)
            results.append(not_annotated(case, label_or_region_to_key(key), name))
            continue
        overlap = _overlap(case, key, name, summary["metrics"][key])
        masks = [region_or_label_to_mask(segmentation, key)[0] for segmentation in segmentations]
        if counted is not None:
            masks = [mask & counted for mask in masks]
        results.append(_complete(overlap, masks[0], masks[1], spacings[0], settings))
    ignored = 0 if counted is None else int(np.sum(~counted))
    return CaseMeasurement(summary, results, ignored, spacings)


def _overlap(case: str, key: LabelOrRegion, name: str, counts: Mapping[str, float]) -> ClassResult:
    return class_result(
        case, label_or_region_to_key(key), name, int(counts["TP"]), int(counts["FP"]), int(counts["FN"])
    )


def _complete(
    result: ClassResult,
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: tuple[float, ...],
    settings: CaseSettings,
) -> ClassResult:
    """Add surfaces and lesions to a class's overlap."""
    if settings.surface_columns:
        result = with_surfaces(
            result,
            settings.surface_columns,
            lambda: surface_metrics(reference, prediction, spacing, settings.tolerance),
            image_diagonal(reference.shape, spacing),
        )
    if result.name in settings.lesion_classes:
        result = with_lesions(result, count_lesions(reference, prediction))
    return result


@dataclass(frozen=True)
class _Segmentation:
    file: str
    voxels: np.ndarray
    spacing: tuple[float, ...]


@dataclass
class _CheckedReader:
    """A reader that refuses damaged files, unknown labels and two different shapes, and keeps what it read.

    nnU-Net's metric function reads reference and prediction through it; the other metrics take them from here.
    """

    reader: BaseReaderWriter
    allowed: frozenset[int]
    read: list[_Segmentation] = field(default_factory=list)

    def read_seg(self, file: str) -> tuple[np.ndarray, dict]:
        """Return a segmentation (1, X, Y, Z) and its properties."""
        try:
            require_whole(Path(file))
            segmentation, properties = self.reader.read_seg(file)
        except Exception as error:
            raise DatasetError(f"{file} cannot be read ({last_line(error)}); write it again or remove it") from error
        unknown = sorted(set(pd.unique(segmentation.ravel()).tolist()) - self.allowed)
        if unknown:
            shown = ", ".join(f"{value:g}" for value in unknown[:5]) + (" and more" if len(unknown) > 5 else "")
            raise DatasetError(
                f"{file} holds labels that dataset.json does not know ({shown}); correct the file, or name the "
                "dataset.json that belongs to it with -djfile"
            )
        if self.read and segmentation.shape != self.read[0].voxels.shape:
            shapes = [" x ".join(map(str, shape[1:])) for shape in (segmentation.shape, self.read[0].voxels.shape)]
            raise DatasetError(
                f"{file} has {shapes[0]} voxels and {self.read[0].file} has {shapes[1]}; check that both are of the "
                "same image, or resample the prediction to the reference's grid"
            )
        # nnU-Net's readers turn SimpleITK's order of axes round: this is the array's order.
        spacing = tuple(float(step) for step in properties["spacing"])
        fault = Geometry(segmentation.shape[1:], spacing).fault
        if fault:
            raise DatasetError(f"{file} {fault}; correct its header or write it again")
        self.read.append(_Segmentation(file, segmentation, spacing))
        return segmentation, properties
