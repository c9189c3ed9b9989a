"""Where things lie in the patient, as the header of an image says."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk


def centroid(mask: np.ndarray, grid: sitk.Image) -> tuple[float, ...] | None:
    """Return the centre of a mask in mm: x grows to the patient's left, y to the back, z to the head.

    Args:
        mask: true where the structure is, (Z, Y, X).
        grid: image of the same size, whose header counts.

    Returns:
        The centre; None for an empty mask.
    """
    profiles = [np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})) for axis in (2, 1, 0)]
    total = int(profiles[0].sum())
    if not total:
        return None
    index = [float(np.arange(len(profile)) @ profile) / total for profile in profiles]
    return grid.TransformContinuousIndexToPhysicalPoint(index)


def lies_left_of(first: tuple[float, ...] | None, second: tuple[float, ...] | None) -> bool:
    """Whether a point lies nearer to the patient's left than another one; False if one of them is unknown."""
    return first is not None and second is not None and first[0] > second[0]
