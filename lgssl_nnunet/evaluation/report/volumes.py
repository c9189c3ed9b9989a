"""Volumes to look at: read in the patient's directions, windowed, cut to what matters, and packed for a viewer."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from lgssl_nnunet.dataset_conversion.volumes import last_line, require_whole_nifti
from lgssl_nnunet.errors import DatasetError

PERCENTILES = (0.5, 99.5)
SOFT_TISSUE = (-160.0, 240.0)  # HU; the usual window of the abdomen
MARGIN_MM = 20.0
_ITK_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd")
_SAMPLE = 2_000_000  # intensities that are enough for a percentile
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Volume:
    """Voxels with their place in the patient.

    Attributes:
        voxels: array (Z, Y, X). Where `oriented`, Z runs to the head, Y to the back and X to the left of the patient.
        spacing: distance of neighbouring voxels along Z, Y and X in mm.
        affine: (4, 4), from voxel indices (X, Y, Z) to mm to the right, front and head, as in NIfTI.
        oriented: whether the file says how the patient lies.
    """

    voxels: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    oriented: bool


Box = tuple[slice, slice, slice]


def read_volume(file: Path, reader: type[BaseReaderWriter]) -> Volume:
    """Read one channel of an image; formats that know the patient's directions are turned into them.

    Args:
        file: the file.
        reader: nnU-Net's reader of the dataset, for formats without directions (PNG, TIFF).

    Raises:
        DatasetError: the file is cut off or cannot be read.
    """
    try:
        require_whole_nifti(file)
        if file.name.endswith(_ITK_ENDINGS):
            image = sitk.ReadImage(str(file))
            if image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() == 1:
                return _oriented(sitk.DICOMOrient(image, "LPS"))
        voxels, properties = reader().read_images([str(file)])
    except Exception as error:
        raise DatasetError(f"{file} cannot be read ({last_line(error)}); write it again or remove it.") from error
    spacing = tuple(float(value) for value in np.broadcast_to(properties["spacing"], 3))
    return Volume(voxels[0], spacing, np.diag([*spacing[::-1], 1.0]), oriented=False)


def read_labels(file: Path, reader: type[BaseReaderWriter]) -> Volume:
    """Read a segmentation as whole numbers, whatever type the file has; otherwise as `read_volume`."""
    volume = read_volume(file, reader)
    values = np.rint(volume.voxels)
    return replace(volume, voxels=values.astype(np.uint8 if values.max() < 256 else np.int32))


def _oriented(image: sitk.Image) -> Volume:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) @ np.diag(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return Volume(sitk.GetArrayFromImage(image), image.GetSpacing()[::-1], _LPS_TO_RAS @ affine, oriented=True)


def windowed(volume: Volume, window: tuple[float, float] | None = None) -> Volume:
    """Return the intensities of a window as 0 to 255 (uint8); what lies outside becomes the nearer end.

    Args:
        volume: the image.
        window: lowest and highest intensity; None takes the 0.5 and 99.5 percentile.
    """
    voxels = np.nan_to_num(volume.voxels.astype(np.float32))
    sample = voxels.ravel()[:: max(voxels.size // _SAMPLE, 1)]
    low, high = window or np.percentile(sample, PERCENTILES)
    scaled = np.clip((voxels - low) / max(float(high - low), 1e-12), 0, 1) * 255
    return replace(volume, voxels=scaled.astype(np.uint8))


def box_around(mask: np.ndarray, spacing: Sequence[float], margin: float = MARGIN_MM) -> Box:
    """Return the box around the voxels of a mask with a margin in mm; the whole volume if the mask is empty."""
    if not mask.any():
        return tuple(slice(0, size) for size in mask.shape)
    sides = []
    for axis, (size, step) in enumerate(zip(mask.shape, spacing, strict=True)):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        pad = int(np.ceil(margin / step))
        sides.append(slice(max(int(inside[0]) - pad, 0), min(int(inside[-1]) + 1 + pad, size)))
    return tuple(sides)


def cropped(volume: Volume, box: Box) -> Volume:
    """Return the part of a volume that lies in a box, at its place in the patient."""
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [side.start for side in reversed(box)]
    return replace(volume, voxels=volume.voxels[box], affine=affine)


def coarsened(volume: Volume, steps: tuple[int, int, int]) -> Volume:
    """Return every n-th voxel along each axis (Z, Y, X)."""
    affine = volume.affine.copy()
    affine[:3, :3] = affine[:3, :3] @ np.diag(steps[::-1])
    spacing = tuple(step * value for step, value in zip(steps, volume.spacing, strict=True))
    voxels = volume.voxels[:: steps[0], :: steps[1], :: steps[2]]
    return replace(volume, voxels=voxels, affine=affine, spacing=spacing)


def nifti_bytes(volume: Volume) -> bytes:
    """Return a volume as the content of a .nii.gz file."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume.voxels.transpose(2, 1, 0)), volume.affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)
