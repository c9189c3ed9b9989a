"""BTCV, the abdomen part of Beyond the Cranial Vault (Synapse syn3193805): portal-venous CT, 13 organs.

Facts, traps and layouts: datasets.md section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.anatomy import centroid, lies_left_of
from lgssl_nnunet.dataset_conversion.convert import convert
from lgssl_nnunet.dataset_conversion.dataset import (
    TEST,
    TRAIN,
    UNLABELED,
    ConvertibleDataset,
    Layout,
    PreparedCase,
    PrepareOptions,
    SourceCase,
)
from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.dataset_conversion.numbered import check_pairs, find_numbered, ignored, join
from lgssl_nnunet.dataset_conversion.volumes import is_integer, label_values, read_volume
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.problems import Problem

TRAINING_IDS = frozenset((*range(1, 11), *range(21, 41)))
TEST_IDS = frozenset(range(61, 81))
_DIGITS = 4
_PATTERNS = {"image": r"img(\d{4})", "label": r"label(\d{4})"}
_LABELS = {
    "background": 0,
    "spleen": 1,
    "right kidney": 2,
    "left kidney": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior vena cava": 9,
    "portal vein and splenic vein": 10,
    "pancreas": 11,
    "right adrenal gland": 12,
    "left adrenal gland": 13,
}
_RIGHT_AND_LEFT = (("right kidney", "left kidney"), ("liver", "spleen"))
_DUODENUM = 14
"""Value that the relabelling of Zenodo 1169361 has and the official segmentations have not."""
_LAST_OF_EIGHT = 8
"""Highest value of the subset that TransUNet made popular."""


def convert_btcv(download: Path | str, **options: Any) -> Path:
    """Convert BTCV; options and result as in `lgssl_nnunet.convert_dataset`."""
    return convert(DATASET, download, **options)


def find_layouts(download: Path) -> tuple[list[Layout], list[Problem]]:
    """Return the one known layout, img00XX and label00XX in any folders, and the problems of its files."""
    found = find_numbered(download, _PATTERNS)
    images, labels = found.files["image"], found.files["label"]
    if not images:
        return [], []
    foreign = sorted({*images, *labels} - TRAINING_IDS - TEST_IDS)
    if foreign:
        return [], [*found.problems, _renumbered(download, foreign)]
    warnings, problems = check_pairs(images, labels, TRAINING_IDS, _DIGITS)
    cases = tuple(_case(number, image, labels.get(number)) for number, image in images.items())
    warnings += [*_warn_of_test_labels(TEST_IDS.intersection(labels)), *ignored(found.others)]
    return [Layout("Synapse RawData", cases, prepare_case, warnings=tuple(warnings))], [*found.problems, *problems]


def prepare_case(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read a case and refuse other sets of classes, and organs on the wrong side of the body."""
    image = read_volume(case.image)
    if case.label is None:
        return PreparedCase(image, image_as_is=True)
    label = read_volume(case.label)
    _require_official_classes(label, case.label)
    if Geometry.of(label).matches(Geometry.of(image)):  # else the headers are refused later, with that reason
        _require_sides(label, case.label)
    return PreparedCase(image, label, image_as_is=True, label_as_is=is_integer(label))


def _case(number: int, image: Path, label: Path | None) -> SourceCase:
    part = TEST if number in TEST_IDS else TRAIN if label else UNLABELED
    return SourceCase(f"btcv_{number:0{_DIGITS}d}", image, label, part)


def _renumbered(download: Path, foreign: Iterable[int]) -> Problem:
    found = f"holds the cases {join(foreign, _DIGITS)}, which BTCV does not have (0001-0010, 0021-0040, 0061-0080)"
    return Problem(
        str(download),
        found,
        "if this copy was renumbered, how is not published, and no published split fits it; give the files as "
        "published by Synapse, and more images with --unlabeled",
    )


def _warn_of_test_labels(numbers: Iterable[int]) -> list[str]:
    shown = join(numbers, _DIGITS)
    return [f"BTCV publishes no segmentations of test cases; find out where these are from: {shown}."] if shown else []


def _require_official_classes(label: sitk.Image, path: Path) -> None:
    """Refuse the relabelling with 14 classes and subsets of 8, whose values mean other organs."""
    last = label_values(label, path)[-1]
    if last == _DUODENUM:
        raise DatasetError(
            f"{path}: holds the value {_DUODENUM} (duodenum) of the relabelling Zenodo 1169361, which is another "
            "dataset with incomplete organs; give the segmentations of Synapse syn3193805."
        )
    if 0 < last <= _LAST_OF_EIGHT:
        raise DatasetError(
            f"{path}: holds no value above {_LAST_OF_EIGHT}, so it is a subset of the 13 organs, for which two orders "
            "of classes exist; give the segmentations of Synapse syn3193805."
        )


def _require_sides(label: sitk.Image, path: Path) -> None:
    """Refuse a case in which an organ of the right lies left of its counterpart: voxels or header are mirrored."""
    array = sitk.GetArrayViewFromImage(label).round()
    for right, left in _RIGHT_AND_LEFT:
        if lies_left_of(*(centroid(array == _LABELS[name], label) for name in (right, left))):
            raise DatasetError(
                f"{path}: by its header the {right} lies to the left of the {left}, so voxels or header are mirrored; "
                "give image and segmentation as published."
            )


DATASET = ConvertibleDataset(
    key="BTCV",
    number=503,
    name="BTCV",
    channel="CT",
    derived_channel="CT",
    labels=_LABELS,
    optional_labels=frozenset({"gallbladder"}),
    prompts={
        **{name: name for name in _LABELS if name != "background"},
        "esophagus": "oesophagus",  # the spelling of the bank's sentence
    },
    licence=(
        "Synapse syn3193805: registration and its terms of access; no licence text was found, so do not pass the data "
        "on. (The CC BY 4.0 that is sometimes quoted belongs to another annotation, Zenodo 1169361.)"
    ),
    reference=(
        "Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault, Workshop and Challenge, 2015, Synapse "
        "syn3193805"
    ),
    find_layouts=find_layouts,
    download=(
        "RawData/Training/img/img0001.nii.gz, RawData/Training/label/label0001.nii.gz and "
        "RawData/Testing/img/img0061.nii.gz, in these or other folders"
    ),
)
