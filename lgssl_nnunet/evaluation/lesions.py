"""Lesions: which classes are made of them, and which of them a prediction finds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import cc3d
import numpy as np

_LESIONS = {"tumor", "tumour", "lesion", "metastasis", "metastase", "cancer", "nodule", "cyst", "neoplasm", "polyp"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


@dataclass(frozen=True)
class LesionCounts:
    """Connected components of two masks.

    Attributes:
        reference: lesions of the reference.
        prediction: lesions of the prediction.
        found: lesions of the reference that share at least one voxel with the prediction.
        false_positives: lesions of the prediction that share no voxel with the reference.
    """

    reference: int
    prediction: int
    found: int
    false_positives: int


def count_lesions(reference: np.ndarray, prediction: np.ndarray) -> LesionCounts:
    """Count the lesions of two masks; voxels that touch at a face, edge or corner are one lesion.

    Args:
        reference: mask, bool, 2D or 3D.
        prediction: mask of the same shape.
    """
    connectivity = 26 if reference.ndim == 3 else 8
    lesions, number = cc3d.connected_components(reference, connectivity=connectivity, return_N=True)
    predicted, number_predicted = cc3d.connected_components(prediction, connectivity=connectivity, return_N=True)
    # Background never counts: a label is only looked up where both masks are set.
    both = reference & prediction
    return LesionCounts(
        reference=number,
        prediction=number_predicted,
        found=len(np.unique(lesions[both])),
        false_positives=number_predicted - len(np.unique(predicted[both])),
    )


def lesion_class_names(names: Iterable[str]) -> list[str]:
    """Return the names that hold a word for lesions, such as "liver_tumour", "Metastases" or "adenocarcinoma"."""
    return [name for name in names if any(_means_lesion(word.lower()) for word in _WORD.findall(name))]


def _means_lesion(word: str) -> bool:
    singular = word.removesuffix("s") if word not in _LESIONS else word
    return singular in _LESIONS or singular.endswith("carcinoma")
