"""Tiny raw datasets in nnU-Net's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

LABELS = {"background": 0, "liver": 1, "spleen": 2}
SHAPE = (20, 24, 22)
SPACING = (1.0, 1.0, 1.0)


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nnU-Net's three folders in it, to which the environment points."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def save_volume(array: np.ndarray, path: Path, spacing=SPACING, origin=(0, 0, 0), direction=None) -> None:
    """Write an array (Z, Y, X); spacing and origin in the order x, y, z."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([float(length) for length in spacing])
    image.SetOrigin([float(length) for length in origin])
    if direction is not None:
        image.SetDirection([float(cosine) for cosine in direction])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)


def phantom(seed: int, shape: Sequence[int] = SHAPE, values: Sequence[int] = (1, 2)) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (Z, Y, X) of noise with bright boxes and the label of the boxes."""
    random = np.random.default_rng(seed)
    label = np.zeros(shape, dtype=np.uint8)
    for value in values:
        corner = [int(random.integers(0, max(1, length // 2))) for length in shape]
        box = tuple(slice(c, c + max(1, length // 3)) for c, length in zip(corner, shape, strict=True))
        label[box] = value
    image = (random.normal(10, 1, shape) + 5 * label).astype(np.float32)
    return image, label


class RawDatasetWriter:
    """Writes cases into one raw dataset folder."""

    def __init__(self, folder: Path, channels: int = 1, **dataset_json) -> None:
        self.folder = folder
        self.channels = channels
        self.content = {
            "channel_names": {str(channel): "CT" if channel == 0 else "MRI" for channel in range(channels)},
            "labels": LABELS,
            "file_ending": ".nii.gz",
            **dataset_json,
        }
        self.write_json()

    def write_json(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "dataset.json").write_text(json.dumps(self.content))

    def image_file(self, case: str, channel: int = 0, folder: str = "imagesTr") -> Path:
        return self.folder / folder / f"{case}_{channel:04d}.nii.gz"

    def label_file(self, case: str) -> Path:
        return self.folder / "labelsTr" / f"{case}.nii.gz"

    def add(self, case: str, *, labeled: bool = True, folder: str = "imagesTr", shape=SHAPE, **geometry) -> None:
        values = [value for value in self.content["labels"].values() if isinstance(value, int) and value > 0]
        image, label = phantom(sum(case.encode()), shape, values or (1, 2))
        for channel in range(self.channels):
            save_volume(image + channel, self.image_file(case, channel, folder), **geometry)
        if labeled:
            save_volume(label, self.label_file(case), **geometry)


@pytest.fixture
def raw_dataset(data_root: Path) -> Callable[..., RawDatasetWriter]:
    """Factory: `raw_dataset(labeled=6, unlabeled=2, in_images_un=1)` writes and returns a raw dataset."""

    def make(
        labeled: int = 6, unlabeled: int = 2, in_images_un: int = 1, test: int = 1, number: int = 901, **options
    ) -> RawDatasetWriter:
        geometry = options.pop("geometry", {})
        writer = RawDatasetWriter(data_root / "nnUNet_raw" / f"Dataset{number}_Tiny", **options)
        for index in range(labeled):
            writer.add(f"lab_{index:02d}", **geometry)
        for index in range(unlabeled):
            writer.add(f"unl_{index:02d}", labeled=False, **geometry)
        for index in range(in_images_un):
            writer.add(f"more_{index:02d}", labeled=False, folder="imagesUn", **geometry)
        for index in range(test):
            writer.add(f"test_{index:02d}", labeled=False, folder="imagesTs", **geometry)
        return writer

    return make


@pytest.fixture
def plan_tiny() -> Callable[..., Path]:
    """`plan_and_preprocess` for one tiny dataset: CPU planner, this process only, no progress bar."""
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    def run(dataset: int | str = 901, **options) -> Path:
        options = {
            "planner": "LGSSLPlannerCPU",
            "configurations": ("3d_fullres",),
            "num_processes": 0,
            "num_processes_fingerprint": 0,
            "progress": False,
            **options,
        }
        (file,) = plan_and_preprocess(dataset, **options)
        return file

    return run
