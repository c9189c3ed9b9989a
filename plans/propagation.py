"""Carrying the label of one slice through a volume by slice-to-slice registration, blind to every other label."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

Registration = Callable[[np.ndarray, np.ndarray, np.ndarray, tuple[float, float]], np.ndarray]
"""From the slice to be labelled, its labelled neighbour, the neighbour's label (all (H, W)) and the spacing along H and
W to the label carried over."""

_MARGIN = 24  # voxels around the label in which slices are registered
_SMALLEST_SIDE = 4  # of the recursive filters in a registration
_AFFINE_ITERATIONS = 60
_DEMONS_ITERATIONS = 30
_FIELD_SMOOTHING = 1.5  # voxels
_IMAGE_SMOOTHING = 1.0  # voxels
_OPENING_RADIUS = [2, 2]  # 5 x 5


def propagate(
    image: np.ndarray,
    label: np.ndarray,
    axis: int,
    position: int,
    spacing: Sequence[float],
    register: Registration,
) -> np.ndarray:
    """Return a label volume made from the label of one slice.

    From its slice outwards, each neighbour is registered to the slice before it and takes over the label, which is then
    opened and closed by 5 x 5 voxels. Where nothing is left of it, propagation ends and the rest is background.

    Source: DeSCO (2023), without the full label that decides on the released code's propagation; methods.md section 9.

    Args:
        image: (X, Y, Z).
        label: label of the slice, two-dimensional.
        axis: axis along which the label travels.
        position: index of the labelled slice on that axis.
        spacing: of the image, in mm.
        register: a value of `REGISTRATIONS`.

    Returns:
        (X, Y, Z), int16.
    """
    slices = np.moveaxis(image, axis, 0)
    labels = np.zeros(slices.shape, np.int16)
    labels[position] = label
    in_plane = tuple(np.delete(spacing, axis))
    for step in (1, -1):
        current = labels[position]
        index = position + step
        while 0 <= index < len(slices) and current.any():
            box = _surroundings(current)
            fixed, moving, carried = slices[index][box], slices[index - step][box], current.copy()
            if min(fixed.shape) >= _SMALLEST_SIDE and np.ptp(fixed) > 0 and np.ptp(moving) > 0:
                carried[box] = register(fixed, moving, current[box], in_plane)
            current = labels[index] = smoothed(carried)
            index += step
    return np.moveaxis(labels, 0, axis)


def _surroundings(label: np.ndarray) -> tuple[slice, slice]:
    """Return the box around the label in which slices are registered: the rest of the body costs time and misleads."""
    found = [np.flatnonzero(label.any(axis=1 - axis)) for axis in (0, 1)]
    return tuple(slice(max(0, int(where[0]) - _MARGIN), int(where[-1]) + 1 + _MARGIN) for where in found)


def smoothed(label: np.ndarray) -> np.ndarray:
    """Return the label with every class opened and then closed by 5 x 5 voxels.

    A voxel that several classes claim keeps its class. A class that the opening would remove altogether stays as it is:
    the published organs are larger than that.

    Args:
        label: (H, W).
    """
    result = np.zeros_like(label)
    for value in np.unique(label[label > 0]):
        mask = sitk.GetImageFromArray((label == value).astype(np.uint8))
        opened = sitk.BinaryMorphologicalOpening(mask, _OPENING_RADIUS, sitk.sitkBox)
        closed = sitk.BinaryMorphologicalClosing(opened, _OPENING_RADIUS, sitk.sitkBox)
        found = sitk.GetArrayViewFromImage(closed) > 0
        found = found if found.any() else label == value
        result[found & ((result == 0) | (label == value))] = value
    return result


def register_with_simpleitk(
    fixed: np.ndarray, moving: np.ndarray, label: np.ndarray, spacing: tuple[float, float]
) -> np.ndarray:
    """Carry a label over by an affine and then a symmetric-forces demons registration of the two slices."""
    target, source = (_smooth_image(array, spacing) for array in (fixed, moving))
    affine = _affine(target, source)
    demons = sitk.FastSymmetricForcesDemonsRegistrationFilter()
    demons.SetNumberOfIterations(_DEMONS_ITERATIONS)
    demons.SetSmoothDisplacementField(True)
    demons.SetStandardDeviations(_FIELD_SMOOTHING)
    start = sitk.TransformToDisplacementField(
        affine, sitk.sitkVectorFloat64, target.GetSize(), target.GetOrigin(), target.GetSpacing(), target.GetDirection()
    )
    transform = sitk.DisplacementFieldTransform(demons.Execute(target, source, start))
    carried = sitk.Resample(_image(label, spacing), target, transform, sitk.sitkNearestNeighbor, 0)
    return sitk.GetArrayFromImage(carried)


def _affine(fixed: sitk.Image, moving: sitk.Image) -> sitk.Transform:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMeanSquares()
    method.SetInterpolator(sitk.sitkLinear)
    voxel = min(fixed.GetSpacing())
    method.SetOptimizerAsRegularStepGradientDescent(voxel, 1e-3 * voxel, _AFFINE_ITERATIONS)
    method.SetOptimizerScalesFromPhysicalShift()
    start = sitk.AffineTransform(2)
    start.SetCenter(fixed.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in fixed.GetSize()]))
    method.SetInitialTransform(start, inPlace=False)
    before = method.MetricEvaluate(fixed, moving)
    transform = method.Execute(fixed, moving)
    # On slices that hardly resemble each other the search can run away.
    return transform if method.GetMetricValue() < before else start


def _smooth_image(array: np.ndarray, spacing: tuple[float, float]) -> sitk.Image:
    image = _image(array.astype(np.float32), spacing)
    return sitk.SmoothingRecursiveGaussian(image, [_IMAGE_SMOOTHING * width for width in image.GetSpacing()])


def _image(array: np.ndarray, spacing: tuple[float, float]) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing([float(width) for width in reversed(spacing)])
    return image


def register_with_ants(
    fixed: np.ndarray, moving: np.ndarray, label: np.ndarray, spacing: tuple[float, float]
) -> np.ndarray:
    """Carry a label over by ANTs' rigid, affine and symmetric normalisation (SyNRA), which DeSCO asked for.

    ANTs starts from the slices as they lie: aligning their centres of mass first moved small slices apart.
    """
    import ants

    target, source, carried = (
        ants.from_numpy(array.astype(np.float32), spacing=list(spacing)) for array in (fixed, moving, label)
    )
    with tempfile.TemporaryDirectory() as folder:
        found = ants.registration(
            target,
            source,
            type_of_transform="SyNRA",
            initial_transform="identity",
            outprefix=str(Path(folder) / "step_"),
            random_seed=0,
        )
        carried = ants.apply_transforms(target, carried, found["fwdtransforms"], interpolator="nearestNeighbor")
    return carried.numpy().astype(label.dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let SimpleITK compute on one thread in the block."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


REGISTRATIONS: dict[str, Registration] = {"simpleitk": register_with_simpleitk, "ants": register_with_ants}
