"""A made-up CT with many classes, for the benchmarks beside it: time and memory depend on its size, not on anatomy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.files import write_json

SPACING = (0.8, 0.8, 2.0)
"""Millimetres along x, y, z, as in an abdominal CT."""


def write_ct_dataset(folder: Path, cases: int, shape: Sequence[int], classes: int) -> None:
    """Write a raw dataset of labelled CTs.

    Args:
        folder: `DatasetXXX_Name`.
        cases: number of cases.
        shape: (Z, Y, X) of each.
        classes: number of foreground classes.
    """
    for case in range(cases):
        image, label = ct(shape, classes, case)
        write_volume(image, folder / "imagesTr" / f"case_{case}_0000.nii.gz")
        write_volume(label, folder / "labelsTr" / f"case_{case}.nii.gz")
    labels = {"background": 0, **{f"organ {label}": label for label in range(1, classes + 1)}}
    # No bank knows an "organ 7"; the names of real structures spare the benchmark a text encoder.
    prompts = dict.fromkeys(list(labels)[1:], "liver")
    write_json(
        {
            "channel_names": {"0": "CT"},
            "labels": labels,
            "prompts": prompts,
            "numTraining": cases,
            "file_ending": ".nii.gz",
        },
        folder / "dataset.json",
    )


def ct(shape: Sequence[int], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (Z, Y, X), int16, of a body with ellipsoid organs in air, and their label map, uint8."""
    random = np.random.default_rng(seed)
    grid = np.ogrid[tuple(slice(-1, 1, complex(0, length)) for length in shape)]
    body = (grid[1] / 0.75) ** 2 + (grid[2] / 0.9) ** 2 < 1
    image = np.where(np.broadcast_to(body, shape), np.int16(0), np.int16(-1000))
    label = np.zeros(shape, dtype=np.uint8)
    for organ in range(1, classes + 1):
        centre, radii = random.uniform(-0.5, 0.5, 3), random.uniform(0.1, 0.3, 3)
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radii, strict=True)) < 1
        label[inside] = organ
        image[inside] = 20 + 10 * organ
    for plane in image:
        plane += random.normal(0, 15, plane.shape).astype(np.int16)
    return image, label


def write_volume(array: np.ndarray, file: Path) -> None:
    """Write a compressed volume."""
    file.parent.mkdir(parents=True, exist_ok=True)
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing(SPACING)
    sitk.WriteImage(volume, str(file), True)
