"""Left Atrium, the 2018 Atrial Segmentation Challenge: late gadolinium-enhanced MRI, one class.

Facts, traps and layouts: datasets.md section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.convert import convert
from lgssl_nnunet.dataset_conversion.dataset import (
    TEST,
    TRAIN,
    UNLABELED,
    ConvertibleDataset,
    Layout,
    Prepare,
    PreparedCase,
    PrepareOptions,
    SourceCase,
)
from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.dataset_conversion.lists import read_lists, sort_into_parts
from lgssl_nnunet.dataset_conversion.volumes import (
    find_files,
    image_from_xyz,
    label_values,
    read_h5,
    read_volume,
    with_spacing,
)
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.problems import Problem

SPACING = (0.625, 0.625, 0.625)
"""Published resolution in mm; every header of the official package says 1."""
NUM_SLICES = 88
"""Of every case; tells the slice axis of copies that lost their header."""
_DERIVED = (
    "z-scored over the whole scan and cropped in x and y around the true mask (test and unlabelled cases too), so "
    "figures on them assume that somebody has already found the left atrium"
)


def convert_left_atrium(download: Path | str, **options: Any) -> Path:
    """Convert the Left Atrium; options and result as in `lgssl_nnunet.convert_dataset`."""
    return convert(DATASET, download, **options)


def find_layouts(download: Path) -> tuple[list[Layout], list[Problem]]:
    """Return the layouts that a folder holds: challenge NRRD, UA-MT h5, Universal-Medical-SSL NIfTI."""
    layouts, problems = [], []
    challenge = find_files(download, "lgemri.nrrd")
    if challenge:
        cases = tuple(_challenge_case(image) for image in challenge)
        layouts.append(Layout("challenge NRRD", cases, prepare_challenge, spacing=SPACING))
    for name, pattern, prepare in (
        ("UA-MT h5", "mri_norm*.h5", prepare_h5),
        ("Universal-Medical-SSL NIfTI", "data.nii.gz", prepare_nifti_copy),
    ):
        images = find_files(download, pattern)
        if images:
            layout, found = _listed_layout(name, images, prepare)
            layouts.append(layout)
            problems += found
    return layouts, problems


def prepare_challenge(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read a case of the official package: mask values 0 and 255, spacing lost."""
    image = read_volume(case.image)
    label = None if case.label is None else read_volume(case.label)
    changes = []
    if label is not None and label_values(label, case.label).tolist() == [0, 255]:
        label = label > 0
        changes.append("mask values 0 and 255 became 0 and 1")
    if options.spacing is not None and Geometry.of(image).is_default:
        image = with_spacing(image, options.spacing)
        if label is not None and Geometry.of(label).is_default:
            label = with_spacing(label, options.spacing)
        changes.append(f"spacing 1 mm of the header became the documented {options.spacing[0]} mm")
    return PreparedCase(image, label, tuple(changes))


def prepare_h5(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read a case of UA-MT's copy: arrays (X, Y, Z) without geometry."""
    image, label = read_h5(case.image)
    return _derived_case(image, label, case, options, "axes taken as (x, y, z)")


def prepare_nifti_copy(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read a case of Universal-Medical-SSL's copy: what ITK takes for (Z, Y, X) is (X, Y, Z), the header is fiction."""
    image = sitk.GetArrayFromImage(read_volume(case.image))
    label = None if case.label is None else sitk.GetArrayFromImage(read_volume(case.label))
    return _derived_case(image, label, case, options, "axes reversed, header replaced")


def _derived_case(
    image: np.ndarray, label: np.ndarray | None, case: SourceCase, options: PrepareOptions, axes: str
) -> PreparedCase:
    if image.shape[2] != NUM_SLICES:
        raise DatasetError(
            f"{case.image}: the last axis of {list(image.shape)} is not the {NUM_SLICES} slices of this dataset; give "
            "the files as published."
        )
    spacing = options.spacing or (1.0, 1.0, 1.0)
    segmentation = None if label is None else image_from_xyz(label, spacing)
    changes = (axes, f"spacing set to {spacing[0]} mm")
    return PreparedCase(image_from_xyz(image, spacing), segmentation, changes)


def _challenge_case(image: Path) -> SourceCase:
    label = image.with_name("laendo.nrrd")
    is_test = any("testing" in part.lower() for part in image.parts[-3:])
    part = TEST if is_test else TRAIN if label.exists() else UNLABELED
    return SourceCase(image.parent.name, image, label if label.exists() else None, part)


def _listed_layout(name: str, images: Sequence[Path], prepare: Prepare) -> tuple[Layout, list[Problem]]:
    lists = read_lists(images[0].parent.parent)
    parts, left_out, problems = sort_into_parts({image.parent.name for image in images}, lists)
    cases = [_copied_case(image, parts[image.parent.name]) for image in images if image.parent.name in parts]
    layout = Layout(name, tuple(cases), prepare, left_out=left_out, processing=_DERIVED, spacing=SPACING)
    return layout, problems


def _copied_case(image: Path, part: str) -> SourceCase:
    label = image if image.suffix == ".h5" else image.with_name("label.nii.gz")
    has_label = label.exists()
    return SourceCase(image.parent.name, image, label if has_label else None, part if has_label else UNLABELED)


DATASET = ConvertibleDataset(
    key="LA",
    number=501,
    name="LeftAtrium",
    channel="MRI",
    derived_channel="MRI",
    labels={"background": 0, "left atrium": 1},
    optional_labels=frozenset(),
    prompts={"left atrium": "left atrium"},
    licence=(
        "2018 Atrial Segmentation Challenge, Cardiac Atlas Project, University of Utah; obey its data-use policy, do "
        "not pass the images on."
    ),
    reference=(
        "Xiong et al., A global benchmark of algorithms for segmenting the left atrium from late gadolinium-enhanced "
        "cardiac magnetic resonance imaging, Medical Image Analysis, arXiv 2004.12314"
    ),
    find_layouts=find_layouts,
    download=(
        "<case>/lgemri.nrrd and laendo.nrrd (challenge), <case>/mri_norm2.h5 (UA-MT) or DATASET/<case>/data.nii.gz "
        "and label.nii.gz (Universal-Medical-SSL)"
    ),
)
