"""Distances between the surfaces of two masks, by the libraries of the extra `evaluation`.

Two definitions are in use and do not agree. surface-distance (DeepMind) weights each surface element by its area and
takes the larger of the two directed 95th percentiles. MedPy takes border voxels, all alike, pools both directions
before the percentile, and its average goes from the prediction to the reference only; that is what most papers on
semi-supervised segmentation print. Both are measured, in columns of their own.

Empty masks never come here: `metrics.with_surfaces` decides about them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

SURFACE_COLUMNS = ("hd95", "assd", "surface_dice")
MEDPY_COLUMNS = ("hd95_medpy", "asd_medpy")
_LIBRARIES = {"surface_distance": SURFACE_COLUMNS, "medpy": MEDPY_COLUMNS}


def available_columns() -> tuple[str, ...]:
    """Return the columns whose library is installed, in the order of the table."""
    return tuple(column for module, columns in _LIBRARIES.items() if find_spec(module) for column in columns)


def missing_columns() -> tuple[str, ...]:
    """Return the columns whose library is not installed."""
    return tuple(column for module, columns in _LIBRARIES.items() if not find_spec(module) for column in columns)


def surface_metrics(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """Return the available surface columns of two masks that both hold at least one voxel.

    An axis of length one has no surface across it: such an image is measured in its plane.

    Args:
        reference: mask, bool, 2D or 3D.
        prediction: mask of the same shape.
        spacing: voxel size in mm in the order of the array's axes.
        tolerance: largest distance in mm at which two surfaces count as one in the surface Dice.
    """
    reference, prediction, spacing = _in_plane(reference, prediction, spacing)
    box = _bounding_box(reference | prediction)
    reference, prediction = reference[box], prediction[box]
    columns = available_columns()
    measured = {}
    if set(SURFACE_COLUMNS) <= set(columns):
        measured.update(_weighted_by_area(reference, prediction, spacing, tolerance))
    if set(MEDPY_COLUMNS) <= set(columns):
        measured.update(_by_medpy(reference, prediction, spacing))
    return measured


def image_diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Return the length in mm of an image's diagonal; axes of length one are left out."""
    sides = [size * step for size, step in zip(shape, spacing, strict=True) if size > 1]
    return float(np.linalg.norm(sides))


def _weighted_by_area(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    from surface_distance import metrics as library

    distances = library.compute_surface_distances(reference, prediction, spacing)
    areas = [np.sum(distances[f"surfel_areas_{side}"]) for side in ("gt", "pred")]
    averages = library.compute_average_surface_distance(distances)
    return {
        "hd95": float(library.compute_robust_hausdorff(distances, 95)),
        "assd": float(np.average(averages, weights=areas)),
        "surface_dice": float(library.compute_surface_dice_at_tolerance(distances, tolerance)),
    }


def _by_medpy(reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    from medpy.metric import binary as library

    return {
        "hd95_medpy": float(library.hd95(prediction, reference, voxelspacing=spacing)),
        "asd_medpy": float(library.asd(prediction, reference, voxelspacing=spacing)),
    }


def _in_plane(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Drop axes of length one, but keep two: the libraries know no lines."""
    kept = [axis for axis, size in enumerate(reference.shape) if size > 1]
    for axis in reversed(range(reference.ndim)):
        if len(kept) < 2 and axis not in kept:
            kept.append(axis)
    dropped = tuple(axis for axis in range(reference.ndim) if axis not in kept)
    return reference.squeeze(dropped), prediction.squeeze(dropped), [float(spacing[axis]) for axis in sorted(kept)]


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        occupied = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(occupied[0], occupied[-1] + 1))
    return tuple(box)
