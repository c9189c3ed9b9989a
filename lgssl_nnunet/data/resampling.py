"""nnU-Net's default resampling of images and labels, with equal values and a fraction of the work.

nnU-Net takes a spline of third order for images and, for labels, the class whose indicator, interpolated linearly, is
largest; across thick slices the nearest slice instead of either. It computes both with scipy in float64, 64 products
a voxel, and the labels once for every class.

A spline on a grid is one linear map per axis. Here each map is a band matrix, found by resampling unit vectors with
scipy, and applied slab by slab as a matrix product in float32. Labels are decided by the nearest voxel, and by a vote
of the eight neighbours only where these differ: the number of classes does not matter.

Nothing here imports torch: worker processes that only preprocess start in a fraction of the time and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from nnunetv2.configuration import ANISO_THRESHOLD
from scipy import ndimage

SPLINE_ORDER = 3
SLAB_BYTES = 16 * 2**20
"""About what the intermediate arrays of a slab take."""

_NEGLIGIBLE = 1e-7  # weights of a spline fall by a factor of 3.7 per voxel; float32 knows no smaller share of 1
_ROWS = 48  # of a band that are multiplied at once: more would multiply zeros, fewer make the products inefficient
_TIE = 1e-6
_VOTES = 2**16  # voxels that are voted on at once

Band = tuple[slice, slice, np.ndarray]


def new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Return the number of voxels along each axis after resampling from one spacing to another."""
    return tuple(round(old / new * length) for old, new, length in zip(spacing, target, shape, strict=True))


def nearest_axis(spacing: Sequence[float], target: Sequence[float], force_separate_z: bool | None) -> int | None:
    """Return the axis across which the nearest slice is taken because voxels are long there; None for none.

    Args:
        spacing: of the image, in the order of the axes.
        target: spacing after resampling.
        force_separate_z: entry of the plans; None to decide by the ratio of the spacings.
    """
    if force_separate_z is not None:
        return _longest(spacing) if force_separate_z else None
    for lengths in (spacing, target):
        if max(lengths) / min(lengths) > ANISO_THRESHOLD:
            return _longest(lengths)
    return None


def _longest(spacing: Sequence[float]) -> int | None:
    longest = [axis for axis, length in enumerate(spacing) if length == max(spacing)]
    return longest[0] if len(longest) == 1 else None


def resample_image(
    image: np.ndarray, shape: Sequence[int], nearest: int | None, out: np.ndarray | None = None
) -> np.ndarray:
    """Return one channel on another grid by a cubic spline, within the range of its values.

    Args:
        image: (X, Y, Z), float32.
        shape: (X', Y', Z').
        nearest: axis along which the nearest slice is taken instead; the others are then resampled slice by slice.
        out: array of that shape to write to.

    Returns:
        (X', Y', Z'), float32.
    """
    shape = tuple(int(length) for length in shape)
    if nearest is not None:
        image = image.take(_nearest(image.shape[nearest], shape[nearest]), axis=nearest)
    ranges = _ranges(image, nearest)
    rows_at_once = max(4, min(_ROWS, SLAB_BYTES // (4 * max(image[0].size, shape[1] * shape[2]))))
    first = _bands(image.shape[0], shape[0], rows_at_once) or _slabs(shape[0], rows_at_once)
    middle, last = (_bands(image.shape[axis], shape[axis], _ROWS) for axis in (1, 2))
    resampled = np.empty(shape, dtype=np.float32) if out is None else out
    for rows, columns, weights in first:
        slab = image[columns] if weights is None else np.tensordot(weights, image[columns], axes=1)
        slab = _along_last(_along_middle(slab, middle), last)
        low, high = (limit if limit.shape[0] == 1 else limit[rows] for limit in ranges)
        np.clip(slab, low, high, out=resampled[rows])
    return resampled


def _ranges(image: np.ndarray, nearest: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest value, of the image or of each slice, in a shape that broadcasts."""
    axes = tuple(axis for axis in range(3) if axis != nearest)
    return image.min(axis=axes, keepdims=True), image.max(axis=axes, keepdims=True)


def _slabs(length: int, rows: int) -> list[tuple[slice, slice, None]]:
    """Return an axis that stays as it is in pieces."""
    slabs = [slice(start, min(start + rows, length)) for start in range(0, length, rows)]
    return [(slab, slab, None) for slab in slabs]


def _along_middle(slab: np.ndarray, bands: tuple[Band, ...]) -> np.ndarray:
    if not bands:
        return slab
    result = np.empty((slab.shape[0], bands[-1][0].stop, slab.shape[2]), dtype=np.float32)
    for rows, columns, weights in bands:
        np.matmul(weights, slab[:, columns], out=result[:, rows])
    return result


def _along_last(slab: np.ndarray, bands: tuple[Band, ...]) -> np.ndarray:
    if not bands:
        return slab
    result = np.empty((*slab.shape[:2], bands[-1][0].stop), dtype=np.float32)
    for rows, columns, weights in bands:
        np.matmul(slab[..., columns], weights.T, out=result[..., rows])
    return result


@lru_cache(maxsize=64)
def _bands(length: int, new_length: int, rows_at_once: int) -> tuple[Band, ...]:
    """Return the spline along one axis as blocks of its matrix (new_length, length); none if nothing changes.

    The matrix is what scipy makes of unit vectors. Its entries away from the diagonal fall off so fast that each block
    of rows needs a few columns only.
    """
    if length == new_length:
        return ()
    bands = []
    unit_vectors = np.eye(length)
    matrix = ndimage.zoom(
        unit_vectors, (new_length / length, 1), order=SPLINE_ORDER, mode="nearest", grid_mode=True
    ).astype(np.float32)
    for start in range(0, new_length, rows_at_once):
        rows = slice(start, min(start + rows_at_once, new_length))
        (used,) = np.nonzero((np.abs(matrix[rows]) > _NEGLIGIBLE).any(axis=0))
        columns = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((rows, columns, np.ascontiguousarray(matrix[rows, columns])))
    return tuple(bands)


def resample_labels(labels: np.ndarray, shape: Sequence[int], nearest: int | None) -> np.ndarray:
    """Return a label map on another grid: at each place the label with the largest linear interpolation.

    Where two are equally large, that of the nearest voxel wins if it is one of them, else the smaller value.

    Args:
        labels: (X, Y, Z), whole numbers.
        shape: (X', Y', Z').
        nearest: axis along which the nearest slice is taken instead.

    Returns:
        (X', Y', Z') of the same type; the label map itself where the shapes are equal.
    """
    shape = tuple(int(length) for length in shape)
    if labels.shape == shape:
        return labels
    if nearest is not None:
        labels = labels.take(_nearest(labels.shape[nearest], shape[nearest]), axis=nearest)
    axes = [_Axis(old, new) for old, new in zip(labels.shape, shape, strict=True)]
    mixed = _mixed_cells(labels)
    resampled = labels[np.ix_(*(axis.nearest for axis in axes))]
    rows = max(1, SLAB_BYTES // (shape[1] * shape[2]))
    for start in range(0, shape[0], rows):
        lower = [axes[0].lower[start : start + rows], axes[1].lower, axes[2].lower]
        places = np.nonzero(mixed[np.ix_(*lower)])
        for part in range(0, len(places[0]), _VOTES):
            at = [index[part : part + _VOTES] for index in places]
            at[0] = at[0] + start
            resampled[tuple(at)] = _vote(labels, axes, at, resampled[tuple(at)])
    return resampled


class _Axis:
    """Where the positions of a new grid lie on an old one, along one axis.

    Attributes:
        lower: index of the old voxel below each new position.
        upper: index of the one above.
        share: weight of the one above.
        nearest: index of the nearest.
    """

    def __init__(self, length: int, new_length: int) -> None:
        position = _positions(length, new_length).clip(0, length - 1)
        self.lower = position.astype(np.intp)
        self.upper = np.minimum(self.lower + 1, length - 1)
        self.share = position - self.lower
        self.nearest = _nearest(length, new_length)


def _positions(length: int, new_length: int) -> np.ndarray:
    return (np.arange(new_length) + 0.5) * (length / new_length) - 0.5


def _nearest(length: int, new_length: int) -> np.ndarray:
    return np.floor(_positions(length, new_length) + 0.5).astype(np.intp).clip(0, length - 1)


def _mixed_cells(labels: np.ndarray) -> np.ndarray:
    """Return where a voxel and its next neighbours along the axes, diagonals included, are not all the same label."""
    low, high = labels, labels
    for axis in range(3):
        low = _with_next(np.minimum, low, axis)
        high = _with_next(np.maximum, high, axis)
    return low != high


def _with_next(choose: np.ufunc, values: np.ndarray, axis: int) -> np.ndarray:
    result = values.copy()
    here, following = [slice(None)] * 3, [slice(None)] * 3
    here[axis], following[axis] = slice(None, -1), slice(1, None)
    choose(values[tuple(here)], values[tuple(following)], out=result[tuple(here)])
    return result


def _vote(labels: np.ndarray, axes: list[_Axis], at: list[np.ndarray], nearest: np.ndarray) -> np.ndarray:
    """Return the labels (N,) at places of the new grid, given by an index array per axis.

    Args:
        labels: the old label map.
        axes: how the grids lie.
        at: the places.
        nearest: label of the nearest old voxel at each place.
    """
    corners, weights = _corners(labels, axes, at)
    score = _score(nearest, corners, weights)
    contested = score < 0.5 + _TIE  # otherwise no other label can have more
    corners, weights, best = corners[:, contested], weights[:, contested], nearest[contested]
    largest = score[contested] + _TIE
    won = np.zeros(len(best), dtype=bool)
    for label in corners:
        score = _score(label, corners, weights)
        higher = score > largest
        equal = won & ~higher & (score > largest - _TIE) & (label < best)
        best = np.where(higher | equal, label, best)
        largest = np.where(higher, score, largest)
        won |= higher
    decided = nearest.copy()
    decided[contested] = best
    return decided


def _corners(labels: np.ndarray, axes: list[_Axis], at: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and weights (8, N) of the old voxels around places of the new grid."""
    corners, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        index = [(axis.upper if side else axis.lower)[i] for axis, side, i in zip(axes, corner, at, strict=True)]
        shares = [axis.share[i] if side else 1 - axis.share[i] for axis, side, i in zip(axes, corner, at, strict=True)]
        corners.append(labels[tuple(index)])
        weights.append(shares[0] * shares[1] * shares[2])
    return np.stack(corners), np.stack(weights)


def _score(label: np.ndarray, corners: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return sum(weight * (corner == label) for corner, weight in zip(corners, weights, strict=True))
