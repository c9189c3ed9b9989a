"""Reading volumes of published downloads: NIfTI, NRRD and the h5 files of semi-supervised repositories."""

from __future__ import annotations

import gzip
import math
import os
import re
import textwrap
import zlib
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.errors import DatasetError, MissingDependencyError, install_extra

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
_LABEL_TOLERANCE = 1e-3
_NIFTI_FAULTS = (
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
    EOFError,
    OverflowError,  # a length that is infinite
    ValueError,  # one that is NaN
    zlib.error,
)
_GZIP_CHUNK = 1 << 22
_ZLIB_CHUNK = 1 << 16  # packed: up to a thousand times as much unpacked
_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32
_FIELDS = re.MULTILINE | re.IGNORECASE
_MHA_HEADER_ENDS = re.compile(rb"^ElementDataFile\s*=\s*LOCAL[ \t\r]*\n", _FIELDS)
_NRRD_HEADER_ENDS = re.compile(rb"\n\r?\n")
_LONGEST_REASON = 200
_ITK_SOURCE = re.compile(r"^(?:sitk::|itk::|ITK )ERROR: (?:\w+\(0x[0-9a-f]+\): )?|^\[nrrd\] (?:\w+: )?")


def find_files(folder: Path, *patterns: str) -> list[Path]:
    """Return the files below a folder whose names fit a pattern, sorted; links to folders are followed."""
    found, visited = [], {os.path.realpath(folder)}
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) not in visited]
        visited.update(os.path.realpath(os.path.join(place, name)) for name in folders)
        found += [Path(place, name) for name in files if any(fnmatch(name, pattern) for pattern in patterns)]
    return sorted(found)


def read_volume(path: Path) -> sitk.Image:
    """Read a three-dimensional volume; a fourth axis of length 1 is dropped.

    Raises:
        DatasetError: the file is cut off or unreadable, or holds more than one volume.
    """
    try:
        require_whole(path)
        image = sitk.ReadImage(str(path))
    except (OSError, EOFError, RuntimeError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read ({last_line(error)}); download or copy it again.") from None
    fault = Geometry.of(image).fault
    if fault is not None:
        raise DatasetError(f"{path}: {fault}; correct its header or download it again.")
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        shape = [*image.GetSize(), image.GetNumberOfComponentsPerPixel()]
        raise DatasetError(f"{path}: size and channels {shape} are not those of one volume; give single 3D volumes.")
    return image


def require_whole(path: Path) -> None:
    """Raise OSError, EOFError or zlib.error if a file is cut off, or damaged where its compression has a checksum.

    A compressed file (`.nii.gz`, `.mha`, `.nrrd`) is unpacked for its checksum, once more than by its reader: for files
    whose every byte counts. ITK itself reads a damaged `.mha`, and some `.nrrd`, as other voxels without an error.
    """
    require_whole_nifti(path)
    unpack = {".gz": _unpack_gzip, ".mha": _unpack_mha, ".nrrd": _unpack_nrrd}.get(path.suffix)
    if unpack is not None:
        with path.open("rb") as stream:
            unpack(stream)


def _unpack_gzip(stream: BinaryIO) -> None:
    with gzip.open(stream) as unpacked:
        while unpacked.read(_GZIP_CHUNK):
            pass


def _unpack_mha(stream: BinaryIO) -> None:
    """Unpack the voxels of a MetaImage, if they are compressed and in this file."""
    header = _header(stream, _MHA_HEADER_ENDS)
    if not re.search(rb"^CompressedData\s*=\s*[Tt1]", header, re.MULTILINE):
        return
    unpacker = zlib.decompressobj(_ZLIB_OR_GZIP)
    while not unpacker.eof:
        block = stream.read(_ZLIB_CHUNK)
        if not block:
            raise EOFError("truncated: the compressed voxels do not end as they should")
        unpacker.decompress(block)


def _unpack_nrrd(stream: BinaryIO) -> None:
    """Unpack the voxels of an NRRD file, if they are compressed by gzip, in this file and right behind the header."""
    header = _header(stream, _NRRD_HEADER_ENDS)
    is_gzip = re.search(rb"^encoding: *gz(ip)?\s*$", header, _FIELDS)
    if is_gzip and not re.search(rb"^(data ?file|line skip):", header, _FIELDS):
        _unpack_gzip(stream)


def _header(stream: BinaryIO, ends: re.Pattern[bytes]) -> bytes:
    """Return what precedes the voxels, and go there; nothing if no voxels follow the header."""
    found = ends.search(stream.read(_GZIP_CHUNK))
    if found is None:
        return b""
    stream.seek(found.end())
    return found.string[: found.end()]


def require_whole_nifti(path: Path) -> None:
    """Raise OSError if a NIfTI file ends too early; ITK would fill the rest with zeros. Cheap for whole files.

    A gzip file ends with its uncompressed length: only a file in which that is not the header's is unpacked. From 4 GB
    on it does not tell the length, and a small file could pass for a large one. Other formats are left to readers.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        return
    expected = _nifti_length(path)
    if path.suffix != ".gz":
        _require_length(path.stat().st_size, expected, "bytes")
        return
    with path.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        if int.from_bytes(stream.read(), "little") == expected:
            return
    length, whole = _unpacked_length(path)
    _require_length(length, expected, "uncompressed bytes")
    if not whole:
        raise OSError("truncated or damaged: the compressed file does not end as it should")


def _nifti_length(path: Path) -> int:
    """Return how many bytes a NIfTI file has according to its header, uncompressed."""
    try:
        voxels = nib.load(path).dataobj
    except _NIFTI_FAULTS as error:
        raise OSError(str(error)) from None
    if min(voxels.shape, default=0) < 1:  # ITK reads one voxel where the header says none
        raise OSError(f"the header gives {list(voxels.shape)} voxels along the axes")
    return voxels.offset + math.prod(voxels.shape) * voxels.dtype.itemsize


def _require_length(length: int, expected: int, unit: str) -> None:
    if length < expected:
        raise OSError(f"truncated: {length} of {expected} {unit} are there")


def _unpacked_length(path: Path) -> tuple[int, bool]:
    """Return how many bytes can be unpacked from a gzip file, and whether it ends as it should."""
    length = 0
    try:
        with gzip.open(path) as stream:
            while block := stream.read1(_GZIP_CHUNK):  # read would drop what precedes the damage
                length += len(block)
    except (OSError, EOFError, zlib.error):
        return length, False
    return length, True


def count_not_finite(path: Path, array: np.ndarray) -> int:
    """Count the NaN and infinite voxels of a volume that was read from a file."""
    return count_stored_not_finite(path) or _count(array)


def count_not_finite_if_whole(path: Path) -> int:
    """Do what `require_whole` and `count_stored_not_finite` do, and unpack a compressed file once for both."""
    stored = _float_voxels(path)
    if path.suffix != ".gz" or stored is None:
        require_whole(path)
        return count_stored_not_finite(path)
    require_whole_nifti(path)
    remaining, wrong = math.prod(stored.shape) * stored.dtype.itemsize, 0
    with gzip.open(path) as stream:
        stream.read(stored.offset)
        while block := stream.read(_GZIP_CHUNK):
            wrong += _count(np.frombuffer(block[:remaining], dtype=stored.dtype))
            remaining -= len(block[:remaining])
    return wrong


def require_intact(path: Path, remedy: str = "replace them, for example with background") -> None:
    """Raise if a file is damaged, or a NIfTI file holds NaN or infinite voxels: ITK reads both without a word.

    Args:
        path: the file.
        remedy: what to do about such voxels, for the message.

    Raises:
        DatasetError: with what is wrong, or the number of such voxels.
    """
    try:
        wrong = count_not_finite_if_whole(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read ({last_line(error)}); copy or export it again.") from None
    if wrong:
        raise DatasetError(f"{path}: {wrong} voxels are NaN or infinite; {remedy}.")


def count_stored_not_finite(path: Path) -> int:
    """Count the NaN and infinite voxels that a NIfTI file stores: ITK turns them into 0 when it reads one."""
    stored = _float_voxels(path)
    return 0 if stored is None else _count(stored.get_unscaled())


def _float_voxels(path: Path) -> nib.arrayproxy.ArrayProxy | None:
    """Return the voxels of a NIfTI file that stores them as floating-point numbers, unread; None for other files."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return None
    try:
        image = nib.load(path)
    except _NIFTI_FAULTS as error:
        raise OSError(str(error)) from None
    return image.dataobj if image.get_data_dtype().kind == "f" else None


def _count(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def read_h5(path: Path, names: Sequence[str] = ("image", "label")) -> list[np.ndarray]:
    """Read arrays of an h5 file.

    Raises:
        MissingDependencyError: h5py is not installed.
        DatasetError: the file is unreadable, lacks one of the arrays, or they differ in shape or are not 3D.
    """
    try:
        import h5py
    except ImportError:
        raise MissingDependencyError(f"{path}: reading h5 files needs h5py; run {install_extra('h5')}.") from None
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in names if name not in file]
            arrays = [] if missing else [np.asarray(file[name]) for name in names]
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({last_line(error)}); download or copy it again.") from None
    if missing:
        raise DatasetError(f"{path}: has no array {' and '.join(missing)}; give the files as published.")
    if len({array.shape for array in arrays}) > 1 or arrays[0].ndim != 3:
        shapes = " and ".join(str(list(array.shape)) for array in arrays)
        raise DatasetError(f"{path}: the arrays have shapes {shapes}, not one 3D shape; download it again.")
    return arrays


def image_from_xyz(array: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    """Return an image of an array (X, Y, Z), with identity direction and origin 0."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    image.SetSpacing([float(length) for length in spacing])
    return image


def label_values(label: sitk.Image, path: Path) -> np.ndarray:
    """Return the sorted values of a segmentation as integers; the path is for the message.

    Raises:
        DatasetError: a value is not a whole number, beyond what storing as float explains.
    """
    values = np.unique(sitk.GetArrayViewFromImage(label))
    whole = np.round(values)
    if not np.isfinite(values).all() or np.abs(values - whole).max() > _LABEL_TOLERANCE:
        worst = values[np.abs(values - whole).argmax()]
        raise DatasetError(f"{path}: holds the value {worst:g}, no whole number; give the segmentation as published.")
    return np.unique(whole.astype(np.int64))


def is_integer(image: sitk.Image) -> bool:
    """Whether the voxels are stored as whole numbers."""
    return sitk.GetArrayViewFromImage(image).dtype.kind in "iu"


def as_uint8(label: sitk.Image) -> sitk.Image:
    """Return a segmentation rounded to whole numbers, as uint8, in the same geometry."""
    array = np.round(sitk.GetArrayViewFromImage(label)).astype(np.uint8)
    result = sitk.GetImageFromArray(array)
    result.CopyInformation(label)
    return result


def with_spacing(image: sitk.Image, spacing: Sequence[float]) -> sitk.Image:
    """Return the same voxels with another spacing in mm."""
    changed = sitk.Image(image)
    changed.SetSpacing([float(length) for length in spacing])
    return changed


def volume_name(path: Path) -> str:
    """Return a file's name without the ending of a volume."""
    for ending in VOLUME_ENDINGS:
        if path.name.endswith(ending):
            return path.name.removesuffix(ending)
    return path.stem


def clean_identifier(text: str) -> str:
    """Return a name that can be a case identifier: letters, digits, point, dash, underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_.") or "case"


def last_line(error: Exception) -> str:
    """Return the last line of a message that says something, without where in the library's code it happened.

    ITK and nibabel put the place first and what happened last. Left out are a guess below it ("- could ...") and the
    system's reason, which for a damaged file is "No such file". What is long is cut between words.
    """
    lines = [_ITK_SOURCE.sub("", line.strip()) for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Reason: ", "- "))]
    if not telling:
        return type(error).__name__
    return textwrap.shorten(
        telling[-1], _LONGEST_REASON, placeholder=" ...", break_long_words=False, break_on_hyphens=False
    )
