"""A small abdomen in HU, and files of it as TCIA publishes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

SHAPE = (24, 32, 32)
SPACING = (0.75, 0.75, 1.0)
ORIGIN = (-120.0, -90.0, -310.5)


@dataclass(frozen=True)
class Abdomen:
    """Image (Z, Y, X) in HU, front at low y, and mask of the pancreas, above and in front of the middle."""

    image: np.ndarray
    mask: np.ndarray


def make_abdomen(seed: int = 0) -> Abdomen:
    """Air, a body with a rim of fat, a spine, gas in fat below the pancreas; soft tissue left and right of it."""
    random = np.random.default_rng(seed)
    image = np.full(SHAPE, -1000.0)
    y, x = np.mgrid[: SHAPE[1], : SHAPE[2]] - 15.5
    radius = np.hypot(y, x)
    image[:, radius < 15] = -100
    image[:, radius < 13] = 40
    image[2:11, 7:16, 6:26] = -100
    image[3:9, 9:13, 10:15] = -900
    image[:, 18:25, 13:19] = 600
    mask = np.zeros(SHAPE, bool)
    low = random.integers(8, 10)
    mask[14:20, 9:14, low : low + 11] = True
    mask[16:18, 14:16, low : low + 4] = True
    image[mask] = 100
    image += random.normal(0, 15, SHAPE)
    return Abdomen(np.round(image).astype(np.int16), mask)


def save_nifti(array: np.ndarray, path: Path, spacing=SPACING, origin=ORIGIN, direction=None) -> Path:
    """Write an array (Z, Y, X)."""
    image = sitk.GetImageFromArray(array.astype(np.uint8) if array.dtype == bool else array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)
    return path


def save_series(
    image: np.ndarray,
    folder: Path,
    *,
    series: str = "1.3.6.1.4.1.14519.5.2.1.1",
    positions: Sequence[Sequence[float]] | None = None,
    instances: Sequence[int | str] | None = None,
    slope: float = 1,
    intercept: float = -1024,
    modality: str = "CT",
    orientation: str = "1\\0\\0\\0\\1\\0",
) -> list[Path]:
    """Write the slices of an image (Z, Y, X) as DICOM files `<modality>1-001.dcm`, lowest position last."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    count = len(image)
    if positions is None:
        positions = [(*ORIGIN[:2], ORIGIN[2] + SPACING[2] * index) for index in range(count)]
    files = []
    for index, plane in enumerate(image):
        dicom = sitk.GetImageFromArray(plane)
        dicom.SetSpacing(SPACING[:2])
        tags = {
            "0008|0060": modality,
            "0008|0018": f"{series}.{index + 1}",
            "0020|000d": "1.3.6.1.4.1.14519.5.2.1",
            "0020|000e": series,
            "0020|0013": str(index + 1 if instances is None else instances[index]),
            "0020|0032": "\\".join(f"{number:.3f}" for number in positions[index]),
            "0020|0037": orientation,
            "0018|0050": str(SPACING[2]),
            "0028|1052": str(intercept),
            "0028|1053": str(slope),
        }
        for key, value in tags.items():
            dicom.SetMetaData(key, value)
        files.append(folder / f"{modality if modality != 'CT' else ''}1-{count - index:03d}.dcm")
        writer.SetFileName(str(files[-1]))
        writer.Execute(dicom)
    return files


class TCIADownload:
    """A folder as the NBIA Data Retriever and the archive of labels leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def series_folder(self, number: int) -> Path:
        study, series = "1.3.6.1.4.1.14519.5.2.1", f"1.3.6.1.4.1.14519.5.2.1.{number}"
        return self.folder / "Pancreas-CT" / f"PANCREAS_{number:04d}" / study / series

    def label_file(self, number: int) -> Path:
        return self.folder / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz"

    def add_image(self, number: int, abdomen: Abdomen | None = None, **series: Any) -> None:
        image = (abdomen or make_abdomen(number)).image
        save_series(image, self.series_folder(number), **{"series": f"1.3.6.1.4.1.14519.5.2.1.{number}", **series})

    def add_label(self, number: int, flip: tuple[int, ...] = (), mask: np.ndarray | None = None) -> None:
        """Write a label with a header that has nothing to do with the image, as published."""
        mask = make_abdomen(number).mask if mask is None else mask
        save_nifti(np.flip(mask, flip).astype(np.int16), self.label_file(number), origin=(0, 0, 0))

    def add(self, number: int, flip: tuple[int, ...] = (), **series: Any) -> None:
        self.add_image(number, **series)
        self.add_label(number, flip)


@pytest.fixture
def abdomen() -> Callable[[int], Abdomen]:
    """`abdomen(seed)` makes an image in HU and the mask of its pancreas."""
    return make_abdomen


@pytest.fixture
def write_series() -> Callable[..., list[Path]]:
    """`write_series(image, folder, **tags)` writes a DICOM series."""
    return save_series


@pytest.fixture
def write_nifti() -> Callable[..., Path]:
    """`write_nifti(array, path)` writes an array (Z, Y, X) with the geometry of the DICOM series."""
    return save_nifti


@pytest.fixture
def tcia(tmp_path: Path) -> TCIADownload:
    """An empty download of Pancreas-CT."""
    folder = tmp_path / "download"
    folder.mkdir()
    return TCIADownload(folder)


@pytest.fixture
def convert(request, download, tmp_path):
    """Convert the test module's own `download` as its dataset PLAIN."""
    from lgssl_nnunet.dataset_conversion import convert as conversion

    def run(**options) -> Path:
        options = {"output": tmp_path / "raw", "num_processes": 0, "progress": False, **options}
        return conversion.convert(request.module.PLAIN, download, **options)

    return run
