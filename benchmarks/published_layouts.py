"""Downloads of Pancreas-CT, BTCV and LiTS in their official layouts, made here: converted, planned, and tabled.

    python benchmarks/published_layouts.py --work FOLDER                  volumes of published size and values
    python benchmarks/published_layouts.py --work FOLDER --ct DATA/ct     one real CT with its labels mapped

The plans of the first form are the rows of docs/plans.md that are marked as derived from published statistics: three
volumes per dataset, of small, median and large published size and spacing (datasets' own pages; LiTS' largest volumes
are left out to save time). The anatomy is made up of ellipsoids with published HU values. The second form takes real
voxels through the same writers, converters and planners.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

import lgssl_nnunet
from lgssl_nnunet.files import environment
from lgssl_nnunet.paths import VARIABLES

BTCV_VALUES = {
    "spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "esophagus": 5, "liver": 6, "stomach": 7,
    "aorta": 8, "inferior vena cava": 9, "portal vein and splenic vein": 10, "pancreas": 11, "right adrenal gland": 12,
    "left adrenal gland": 13,
}  # fmt: skip
# Centre and half axes as shares of the volume along x, y, z (LPS: x to the patient's left), HU mean and sd.
ORGANS = {
    "liver": ((0.36, 0.45, 0.60), (0.15, 0.17, 0.16), 122, 30),
    "spleen": ((0.72, 0.58, 0.62), (0.06, 0.08, 0.10), 116, 36),
    "right kidney": ((0.34, 0.66, 0.38), (0.05, 0.05, 0.09), 169, 38),
    "left kidney": ((0.66, 0.66, 0.40), (0.05, 0.05, 0.09), 169, 38),
    "gallbladder": ((0.40, 0.33, 0.44), (0.03, 0.04, 0.05), 52, 38),
    "esophagus": ((0.51, 0.58, 0.88), (0.015, 0.015, 0.08), 40, 30),
    "stomach": ((0.62, 0.38, 0.64), (0.07, 0.07, 0.08), 60, 40),
    "aorta": ((0.52, 0.62, 0.50), (0.02, 0.02, 0.45), 170, 50),
    "inferior vena cava": ((0.46, 0.61, 0.50), (0.02, 0.02, 0.40), 146, 32),
    "portal vein and splenic vein": ((0.52, 0.50, 0.55), (0.06, 0.015, 0.02), 172, 39),
    "pancreas": ((0.56, 0.46, 0.47), (0.08, 0.025, 0.03), 98, 38),
    "right adrenal gland": ((0.42, 0.64, 0.52), (0.015, 0.012, 0.02), 40, 44),
    "left adrenal gland": ((0.60, 0.64, 0.53), (0.015, 0.012, 0.02), 40, 44),
}
TUMOUR = ((0.32, 0.42, 0.62), (0.03, 0.03, 0.03), 70, 25)
BODY = ((0.5, 0.52, 0.5), (0.40, 0.30, 2.0), -95, 20)  # fat between the organs
SPINE = ((0.5, 0.72, 0.5), (0.04, 0.05, 2.0), 500, 80)
TOTALSEGMENTATOR = {
    "spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "liver": 5, "stomach": 6, "pancreas": 7,
    "right adrenal gland": 8, "left adrenal gland": 9, "esophagus": 15, "aorta": 52, "inferior vena cava": 63,
    "portal vein and splenic vein": 64,
}  # fmt: skip
# Size (x, y, z) and spacing in mm: a small, a median and a large published volume of each dataset.
PUBLISHED = {
    "Pancreas": [((512, 512, 181), (0.66, 0.66, 1.0)), ((512, 512, 218), (0.86, 0.86, 1.0)),
                 ((512, 512, 466), (0.98, 0.98, 1.0))],
    "BTCV": [((512, 512, 85), (0.59, 0.59, 5.0)), ((512, 512, 127), (0.76, 0.76, 3.0)),
             ((512, 512, 198), (0.98, 0.98, 2.5))],
    "LiTS": [((512, 512, 74), (0.56, 0.56, 5.0)), ((512, 512, 432), (0.77, 0.77, 1.0)),
             ((512, 512, 600), (1.0, 1.0, 0.7))],
}  # fmt: skip
Volume = tuple[sitk.Image, dict[str, np.ndarray]]
"""Image in HU (int16), and the mask (Z, Y, X) of each organ."""


def made_up_abdomen(size: Sequence[int], spacing: Sequence[float], seed: int) -> Volume:
    """Draw a body with organs; the arrays are (Z, Y, X), x to the patient's left."""
    random = np.random.default_rng(seed)
    shape = tuple(size[::-1])
    values = np.full(shape, -1000, np.float32)
    masks = {}
    parts = {"body": BODY, "spine": SPINE, **ORGANS, "tumour": TUMOUR}
    for name, (centre, axes, mean, sd) in parts.items():
        box, inside = ellipsoid(shape, centre, axes)
        values[box][inside] = random.normal(mean, sd, int(inside.sum()))
        mask = np.zeros(shape, bool)
        mask[box] = inside
        for other in masks.values():
            other &= ~mask
        masks[name] = mask
    image = sitk.GetImageFromArray(np.clip(values, -1024, 3071).astype(np.int16))
    image.SetSpacing([float(length) for length in spacing])
    return image, {name: masks[name] for name in [*ORGANS, "tumour"]}


def ellipsoid(
    shape: Sequence[int], centre: Sequence[float], axes: Sequence[float]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """Return a box of an array (Z, Y, X) and what of it lies inside; centre and axes are shares along x, y, z."""
    box, terms = [], []
    for length, middle, half in zip(shape, centre[::-1], axes[::-1], strict=True):
        first, last = max(0, int((middle - half) * length)), min(length, int((middle + half) * length) + 1)
        box.append(slice(first, last))
        terms.append((((np.arange(first, last) + 0.5) / length - middle) / half) ** 2)
    distance = terms[0][:, None, None] + terms[1][None, :, None] + terms[2][None, None, :]
    return tuple(box), distance <= 1


def real_abdomen(folder: Path) -> Volume:
    """Read the CT of a data folder and map its segmentation (TotalSegmentator v2 numbers) to our names."""
    image = sitk.Cast(sitk.ReadImage(str(folder / "example_ct_sm.nii.gz")), sitk.sitkInt16)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "example_seg.nii.gz")))
    masks = {name: label == value for name, value in TOTALSEGMENTATOR.items()}
    masks["tumour"] = np.zeros(label.shape, bool)
    return image, masks


def label_image(masks: Mapping[str, np.ndarray], values: Mapping[str, int], like: sitk.Image) -> sitk.Image:
    """Return a segmentation on the grid of an image."""
    array = np.zeros(like.GetSize()[::-1], np.uint8)
    for name, value in values.items():
        array[masks[name]] = value
    label = sitk.GetImageFromArray(array)
    label.CopyInformation(like)
    return label


def write_btcv(folder: Path, number: int, image: sitk.Image, masks: Mapping[str, np.ndarray]) -> None:
    """Write one training case of the Synapse download."""
    training = folder / "RawData" / "Training"
    save(image, training / "img" / f"img{number:04d}.nii.gz")
    save(label_image(masks, BTCV_VALUES, image), training / "label" / f"label{number:04d}.nii.gz")


def write_lits(folder: Path, number: int, image: sitk.Image, masks: Mapping[str, np.ndarray]) -> None:
    """Write one training case of LiTS; the tumour counts as a class of its own."""
    batch = folder / f"Training Batch {1 if number < 28 else 2}"
    save(image, batch / f"volume-{number}.nii")
    save(label_image(masks, {"liver": 1, "tumour": 2}, image), batch / f"segmentation-{number}.nii")


def write_pancreas(folder: Path, number: int, image: sitk.Image, masks: Mapping[str, np.ndarray]) -> None:
    """Write one case of TCIA: a DICOM series, and the label with slices in its order and a header of its own."""
    case = folder / "Pancreas-CT" / f"PANCREAS_{number:04d}"
    write_dicom_series(image, case / f"study-{number}" / f"series-{number}", number)
    label = sitk.GetImageFromArray(masks["pancreas"].astype(np.uint8))
    label.SetSpacing(image.GetSpacing())
    save(label, folder / "TCIA_pancreas_labels-02-05-2017" / f"label{number:04d}.nii.gz")


def write_dicom_series(image: sitk.Image, folder: Path, number: int) -> None:
    """Write a CT series of one file per slice."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = image.GetDirection()
    common = {
        "0008|0060": "CT",
        "0010|0020": f"PANCREAS_{number:04d}",
        "0020|000d": f"1.2.826.0.1.3680043.2.1125.{number}.1",
        "0020|000e": f"1.2.826.0.1.3680043.2.1125.{number}.2",
        "0020|0037": "\\".join(f"{direction[i]:.6f}" for i in (0, 3, 6, 1, 4, 7)),
        "0028|1052": "-1024",
        "0028|1053": "1",
    }
    for index in range(image.GetSize()[2]):
        piece = image[:, :, index]
        position = image.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            **common,
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.{number}.3.{index + 1}",
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(f"{coordinate:.6f}" for coordinate in position),
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"1-{index + 1:03d}.dcm"))
        writer.Execute(piece)


def save(image: sitk.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), path.name.endswith(".gz"))


WRITERS: dict[str, Callable[[Path, int, sitk.Image, Mapping[str, np.ndarray]], None]] = {
    "Pancreas": write_pancreas,
    "BTCV": write_btcv,
    "LiTS": write_lits,
}


def write_download(dataset: str, folder: Path, volumes: Sequence[Volume]) -> None:
    """Write a download with the given volumes as cases 1, 2, ..."""
    for number, (image, masks) in enumerate(volumes, 1):
        WRITERS[dataset](folder, number, image, masks)


def plan(dataset: str, download: Path) -> dict:
    """Convert and plan a download; return the plans and the seconds that conversion took."""
    start = time.perf_counter()
    target = lgssl_nnunet.convert_dataset(dataset, download, num_processes=0, progress=False)
    seconds = time.perf_counter() - start
    files = [
        lgssl_nnunet.plan_and_preprocess(
            [target.name], planner=planner, preprocess=False, num_processes_fingerprint=0, progress=False
        )[0]
        for planner in ("LGSSLPlanner", "LGSSLPlannerCPU")
    ]
    return {"seconds": seconds, "plans": [json.loads(file.read_text()) for file in files]}


def table_rows(name: str, plans: Sequence[Mapping]) -> list[str]:
    """Return one line per planner and configuration."""
    rows = []
    for content in plans:
        for configuration, values in content["configurations"].items():
            if configuration == "2d":
                continue
            network = values["architecture"]["arch_kwargs"]
            cells = [
                name,
                content["plans_name"],
                configuration,
                " x ".join(f"{length:g}" for length in values["median_image_size_in_voxels"]),
                " x ".join(f"{length:.3g}" for length in values["spacing"]),
                " x ".join(str(length) for length in values["patch_size"]),
                str(values["batch_size"]),
                f"{network['n_stages']} stages, {network['features_per_stage'][0]} to "
                f"{network['features_per_stage'][-1]} features",
                values["normalization_schemes"][0].removesuffix("Normalization"),
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="empty folder for downloads, raw data and plans")
    parser.add_argument("--ct", type=Path, help="folder with example_ct_sm.nii.gz and example_seg.nii.gz")
    parser.add_argument("--datasets", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    rows = []
    for dataset in tqdm(args.datasets, desc="Datasets"):
        if args.ct:
            volumes = [real_abdomen(args.ct)]
        else:
            volumes = [made_up_abdomen(*published, seed) for seed, published in enumerate(PUBLISHED[dataset])]
        write_download(dataset, args.work / "downloads" / dataset, volumes)
        with environment({name: str(args.work.resolve() / name) for name in VARIABLES}):
            result = plan(dataset, args.work / "downloads" / dataset)
        rows += table_rows(dataset, result["plans"])
        print(f"{dataset}: {len(volumes)} cases converted in {result['seconds']:.1f} s")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
