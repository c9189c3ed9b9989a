"""Bring the left-atrium cases of Lry777/Universal-Medical-SSL into a raw nnU-Net dataset.

    python benchmarks/left_atrium_raw.py DATA/universal_medical_ssl/LA nnUNet_raw/Dataset501_LeftAtrium

The NIfTI arrays of that layout are in the order (z, y, x) and their headers lost the true spacing of 0.625 mm. Cases of
train.list become imagesTr, those of test.list imagesTs (labelsTs is for scoring only).

These arrays were cropped around the true mask by those who published them, unlabelled and test cases too: figures on
them assume that somebody has already found the left atrium.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

SPACING_MM = 0.625


def write_image(array: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((SPACING_MM,) * 3)
    sitk.WriteImage(image, str(path))


def convert(source: Path, target: Path) -> None:
    lists = {"Tr": (source / "train.list").read_text().split(), "Ts": (source / "test.list").read_text().split()}
    for part in lists:
        for kind in ("images", "labels"):
            (target / f"{kind}{part}").mkdir(parents=True, exist_ok=True)
    for part, cases in lists.items():
        for case in tqdm(cases, desc=f"images{part}"):
            folder = source / "DATASET" / case
            image = np.asarray(nibabel.load(folder / "data.nii.gz").dataobj, np.float32)
            label = np.asarray(nibabel.load(folder / "label.nii.gz").dataobj) > 0.5
            write_image(image, target / f"images{part}" / f"{case}_0000.nii.gz")
            write_image(label.astype(np.uint8), target / f"labels{part}" / f"{case}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "left atrium": 1},
        "numTraining": len(lists["Tr"]),
        "file_ending": ".nii.gz",
        "name": "LeftAtrium",
        "reference": "2018 Atrial Segmentation Challenge, as distributed by Lry777/Universal-Medical-SSL",
    }
    (target / "dataset.json").write_text(json.dumps(description, indent=4))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target)
