"""A CT series as volume: slices ordered by position, in HU, refused when slices are missing or the gantry was tilted.

ITK stacks whatever files it is given and writes down one spacing for all of them, so the positions are checked before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.volumes import find_files, last_line
from lgssl_nnunet.errors import DatasetError

logger = logging.getLogger(__name__)

GAP_TOLERANCE = 0.01
"""Of the distance between slices: positions are rounded; a missing slice doubles a distance."""
TILT_TOLERANCE = 0.5
"""In pixels: how far a slice may lie beside the line along the normal through the first slice."""
_ROUNDING = 0.0101
"""In mm: positions with two digits."""
_ORIENTATION_TOLERANCE = 1e-3

_MODALITY, _SERIES = "0008|0060", "0020|000e"
_POSITION, _ORIENTATION, _INSTANCE = "0020|0032", "0020|0037", "0020|0013"


@dataclass(frozen=True)
class DicomSeries:
    """A series of slices.

    Attributes:
        image: the volume in HU; slices ascend along their normal.
        instance_ranks: rank of each slice by InstanceNumber; empty if the numbers are missing or repeat.
    """

    image: sitk.Image
    instance_ranks: tuple[int, ...]

    @property
    def instance_order(self) -> int:
        """1 if InstanceNumber ascends with the position, -1 if it descends, 0 if it does neither."""
        steps = set(np.diff(self.instance_ranks).tolist())
        return steps.pop() if steps in ({1}, {-1}) else 0


@dataclass(frozen=True)
class _Slice:
    """What the header of a slice says."""

    file: Path
    series: str
    instance: int | None
    position: np.ndarray
    orientation: np.ndarray
    size: tuple[int, ...]
    pixel: float

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.orientation[:3], self.orientation[3:])


def dicom_files(folder: Path) -> list[Path]:
    """Return the DICOM files below a folder, however deep studies and series are nested."""
    files = find_files(folder, "[!.]*")  # macOS leaves ._1-001.dcm beside 1-001.dcm
    return [file for file in files if file.suffix.lower() == ".dcm"]


def read_series(folder: Path) -> DicomSeries:
    """Read the one CT series below a folder.

    Raises:
        DatasetError: there is no series or more than one, a file is unreadable, or the slices are no regular stack.
    """
    slices = _ct_slices(folder)
    series = sorted({each.series for each in slices})
    if len(series) > 1:
        raise DatasetError(
            f"{folder}: holds {len(series)} CT series ({_shown(series)}); keep the one that was labelled."
        )
    if len(slices) < 2:
        raise DatasetError(f"{folder}: holds {len(slices)} CT slices, no volume; download the series again.")
    _require_one_grid(folder, slices)
    slices = sorted(slices, key=lambda each: float(each.position @ slices[0].normal))
    _require_no_tilt(folder, slices)
    _require_even_gaps(folder, slices)
    return DicomSeries(_stacked(folder, slices), _instance_ranks(slices))


def _ct_slices(folder: Path) -> list[_Slice]:
    """Read the headers of all files below a folder; objects that are no CT are left out with a log line."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    slices, others = [], []
    for file in dicom_files(folder):
        try:
            reader.SetFileName(str(file))
            reader.ReadImageInformation()
        except RuntimeError as error:
            raise DatasetError(f"{file}: cannot be read ({last_line(error)}); download it again.") from None
        modality = _tag(reader, _MODALITY)
        if modality == "CT":
            slices.append(_slice(reader, file))
        else:
            others.append(modality or "unknown")
    if others:
        logger.info("%s: %d files of modality %s are not read.", folder, len(others), ", ".join(sorted(set(others))))
    return slices


def _slice(reader: sitk.ImageFileReader, file: Path) -> _Slice:
    position, orientation = _numbers(reader, _POSITION, 3), _numbers(reader, _ORIENTATION, 6)
    if position is None or orientation is None:
        raise DatasetError(f"{file}: has no position and orientation of the slice; download it again.")
    instance = _numbers(reader, _INSTANCE, 1)
    return _Slice(
        file=file,
        series=_tag(reader, _SERIES),
        instance=None if instance is None else int(instance[0]),
        position=position,
        orientation=orientation,
        size=(*reader.GetSize(), reader.GetNumberOfComponents()),
        pixel=min(reader.GetSpacing()[:2]),
    )


def _tag(reader: sitk.ImageFileReader, key: str) -> str:
    return reader.GetMetaData(key).strip().strip("\0") if reader.HasMetaDataKey(key) else ""


def _numbers(reader: sitk.ImageFileReader, key: str, count: int) -> np.ndarray | None:
    try:
        numbers = np.array([float(part) for part in _tag(reader, key).split("\\")])
    except ValueError:
        return None
    return numbers if len(numbers) == count else None


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _require_one_grid(folder: Path, slices: Sequence[_Slice]) -> None:
    first = slices[0]
    for each in slices:
        if each.size != first.size:
            sizes = f"{first.file.name} has size and channels {list(first.size)}, {each.file.name} {list(each.size)}"
            raise DatasetError(f"{folder}: {sizes}; keep only the slices of one volume.")
        if np.abs(each.orientation - first.orientation).max() > _ORIENTATION_TOLERANCE:
            raise DatasetError(
                f"{folder}: {first.file.name} and {each.file.name} lie in different directions; keep only the slices "
                "of one volume."
            )


def _require_no_tilt(folder: Path, slices: Sequence[_Slice]) -> None:
    """Refuse slices that are shifted within their plane: a volume of them would be sheared."""
    first, normal = slices[0], slices[0].normal
    offsets = np.array([each.position - first.position for each in slices])
    along = offsets @ normal
    beside = np.linalg.norm(offsets - np.outer(along, normal), axis=1)
    worst = int(beside.argmax())
    if beside[worst] > TILT_TOLERANCE * first.pixel:
        angle = np.degrees(np.arctan2(beside[worst], along[worst]))
        raise DatasetError(
            f"{folder}: slices are shifted by up to {beside[worst]:.2f} mm within their plane, as by a gantry tilt of "
            f"{angle:.1f} degrees; resample the series to a straight volume first."
        )


def _require_even_gaps(folder: Path, slices: Sequence[_Slice]) -> None:
    along = np.array([each.position @ slices[0].normal for each in slices])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    off = np.abs(gaps - usual) > max(GAP_TOLERANCE * usual, _ROUNDING)
    if off.any() or usual <= _ROUNDING:
        worst = int(np.abs(gaps - usual).argmax())
        raise DatasetError(
            f"{folder}: {int(off.sum())} of {len(gaps)} distances between slices are not {usual:.3f} mm, for example "
            f"{gaps[worst]:.3f} mm between {slices[worst].file.name} and {slices[worst + 1].file.name}, so slices are "
            "missing or double; download the series again."
        )


def _instance_ranks(slices: Sequence[_Slice]) -> tuple[int, ...]:
    numbers = [each.instance for each in slices]
    if None in numbers or len(set(numbers)) < len(numbers):
        return ()
    return tuple(int(rank) for rank in np.argsort(np.argsort(numbers)))


def _stacked(folder: Path, slices: Sequence[_Slice]) -> sitk.Image:
    """Read the voxels; GDCM applies slope and intercept of each slice."""
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(each.file) for each in slices])
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise DatasetError(f"{folder}: cannot be read ({last_line(error)}); download it again.") from None
    return _as_int16(image)


def _as_int16(image: sitk.Image) -> sitk.Image:
    """Return whole numbers as int16, as HU are stored; GDCM chooses wider types for what the tags would allow."""
    voxels = sitk.GetArrayViewFromImage(image)
    limits = np.iinfo(np.int16)
    if voxels.min() < limits.min or voxels.max() > limits.max:
        return image
    is_whole = np.issubdtype(voxels.dtype, np.integer) or bool(np.array_equal(voxels, np.round(voxels)))
    return sitk.Cast(image, sitk.sitkInt16 if is_whole else sitk.sitkFloat32)
