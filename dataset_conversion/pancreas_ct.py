"""NIH Pancreas-CT (TCIA): portal-venous CT of 80 people, one class.

Facts, traps and layouts: datasets.md section 3. Images and labels are published apart, and the headers of the labels
do not say how these lie on the images: which way round is measured (`orientation`), and refused where unclear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.convert import convert
from lgssl_nnunet.dataset_conversion.dataset import (
    TRAIN,
    UNLABELED,
    ConvertibleDataset,
    Layout,
    Prepare,
    PreparedCase,
    PrepareOptions,
    SourceCase,
)
from lgssl_nnunet.dataset_conversion.dicom import read_series
from lgssl_nnunet.dataset_conversion.geometry import Geometry, snap
from lgssl_nnunet.dataset_conversion.orientation import (
    FlipScore,
    choose_flip,
    flip_by_header,
    flip_name,
    flipped,
    rank_flips,
)
from lgssl_nnunet.dataset_conversion.volumes import find_files, image_from_xyz, is_integer, read_h5, read_volume
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.problems import Problem

WITHDRAWN = (25, 70)
"""Cases that TCIA took back in 2020."""
H5_SPACING = (1.0, 1.0, 1.0)
"""In mm: what the authors of the h5 files resampled to."""
_H5_PROCESSING = (
    "resampled to 1 mm, HU clipped to [-125, 275], cropped in x and y around the true mask (test cases too) and "
    "z-scored, so figures on them assume that somebody has already found the pancreas"
)
_ZENODO_HIGHEST = 14
_FOLDER = re.compile(r"pancreas_(\d{4})", re.IGNORECASE)
_IMAGE = re.compile(r"(?:image|pancreas_)(\d{4})(?:_0000)?\.nii(?:\.gz)?", re.IGNORECASE)
_LABEL = re.compile(r"label(\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
_H5 = re.compile(r"image(\d{4})_norm\.h5", re.IGNORECASE)


def convert_pancreas_ct(download: Path | str, **options: Any) -> Path:
    """Convert Pancreas-CT; options and result as in `lgssl_nnunet.convert_dataset`."""
    return convert(DATASET, download, **options)


def find_layouts(download: Path) -> tuple[list[Layout], list[Problem]]:
    """Return the layouts that a folder holds: TCIA DICOM, NIfTI, h5 of the MC-Net family."""
    found = _Download.of(download)
    layouts, problems = [], list(found.problems)
    for name, images, prepare in (("TCIA DICOM", found.series, prepare_dicom), ("NIfTI", found.images, prepare_nifti)):
        if images:
            layouts.append(_layout(name, images, found.labels, prepare))
            if not found.labels:
                wrong = f"holds {len(images)} images and no label0001.nii.gz or the like"
                problems.append(Problem(str(download), wrong, "unpack TCIA_pancreas_labels-02-05-2017.zip there"))
    if found.h5:
        layout = _layout("MC-Net h5", found.h5, found.h5, prepare_h5, processing=_H5_PROCESSING, spacing=H5_SPACING)
        layouts.append(layout)
    return layouts, problems


def prepare_dicom(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read a series and its label, whose slices follow ascending InstanceNumber as a rule."""
    series = read_series(case.image)
    if case.label is None:
        return PreparedCase(series.image)
    expected = {1: (), -1: (0,), 0: None}[series.instance_order]
    label, changes = _laid_on(series.image, read_volume(case.label), case, expected)
    return PreparedCase(series.image, label, changes)


def prepare_nifti(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read an image and its label; the label's header is only a hint at how it lies on the image."""
    image = read_volume(case.image)
    if case.label is None:
        return PreparedCase(image, image_as_is=True)
    stored = read_volume(case.label)
    label, changes = _laid_on(image, stored, case, flip_by_header(stored, image))
    as_is = not changes and is_integer(stored)
    return PreparedCase(image, label, changes, image_as_is=True, label_as_is=as_is)


def prepare_h5(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read a case of the h5 copies: arrays (X, Y, Z) without geometry."""
    image, label = read_h5(case.image)
    _refuse_other_label_set(label, case)
    spacing = options.spacing or H5_SPACING
    return PreparedCase(image_from_xyz(image, spacing), image_from_xyz(label, spacing), ("axes taken as (x, y, z)",))


@dataclass
class _Download:
    """What a folder holds: the file, or folder of a series, by number of the case."""

    series: dict[int, Path] = field(default_factory=dict)
    images: dict[int, Path] = field(default_factory=dict)
    labels: dict[int, Path] = field(default_factory=dict)
    h5: dict[int, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> _Download:
        found = cls()
        for file in find_files(folder, "[!.]*"):
            if file.suffix.lower() == ".dcm":
                found._add_slice(file, folder)
            for pattern, places in ((_IMAGE, found.images), (_LABEL, found.labels), (_H5, found.h5)):
                name = pattern.fullmatch(file.name)
                if name:
                    found._add(places, int(name[1]), file)
        return found

    def _add_slice(self, file: Path, folder: Path) -> None:
        """Take the folder PANCREAS_00XX that a slice lies in for the folder of its series."""
        for parent in file.relative_to(folder).parents:
            name = _FOLDER.fullmatch(parent.name)
            if name:
                self._add(self.series, int(name[1]), folder / parent)
                return

    def _add(self, places: dict[int, Path], number: int, place: Path) -> None:
        first = places.setdefault(number, place)
        problem = Problem(str(place), f"is the same case as {first}", "remove one of the two")
        if first != place and problem not in self.problems:
            self.problems.append(problem)


def _layout(name: str, images: dict[int, Path], labels: dict[int, Path], prepare: Prepare, **details: Any) -> Layout:
    left_out = {_identifier(n): _withdrawn(n) for n in WITHDRAWN if n in images or n in labels}
    for number in sorted(set(labels) - set(images) - set(WITHDRAWN)):
        left_out[_identifier(number)] = f"the download holds its label {labels[number].name} but no image"
    numbers = sorted(set(images) - set(WITHDRAWN))
    unlabeled = [_identifier(number) for number in numbers if number not in labels]
    warnings = (f"These cases have no label and become unlabelled images: {', '.join(unlabeled)}.",)
    cases = tuple(_case(number, images[number], labels.get(number)) for number in numbers)
    return Layout(name, cases, prepare, left_out=left_out, warnings=warnings if unlabeled else (), **details)


def _case(number: int, image: Path, label: Path | None) -> SourceCase:
    return SourceCase(_identifier(number), image, label, UNLABELED if label is None else TRAIN)


def _identifier(number: int) -> str:
    return f"pancreas_{number:04d}"


def _withdrawn(number: int) -> str:
    return f"TCIA withdrew case {number}, the same scan as {_identifier(2)}"


def _laid_on(
    image: sitk.Image, label: sitk.Image, case: SourceCase, expected: tuple[int, ...] | None
) -> tuple[sitk.Image, tuple[str, ...]]:
    """Return the label's voxels on the grid of the image, mirrored if need be, and what was changed."""
    if label.GetSize() != image.GetSize():
        sizes = f"has size {list(label.GetSize())}, {case.image.name} has {list(image.GetSize())}"
        raise DatasetError(f"{case.label}: {sizes}; download both again, a slice may be missing.")
    voxels = sitk.GetArrayViewFromImage(label)
    _refuse_other_label_set(voxels, case)
    flip, reason = _measured_flip(sitk.GetArrayViewFromImage(image), voxels > 0.5, case, expected)
    changes = [f"segmentation {flip_name(flip)} ({reason})"] if flip else []
    differences = Geometry.of(label).differences(Geometry.of(image), "the image")
    if differences:
        changes.append(f"header of the segmentation replaced by that of the image: it {', '.join(differences)}")
    return (snap(flipped(label, flip), image) if changes else label), tuple(changes)


def _measured_flip(
    image: np.ndarray, mask: np.ndarray, case: SourceCase, expected: tuple[int, ...] | None
) -> tuple[tuple[int, ...], str]:
    """Return the axes to mirror the mask along, and the measurements in words.

    Raises:
        DatasetError: it is unclear which way round is right.
    """
    if not mask.any():
        return (), ""  # refused with the other checks of the values
    scores = rank_flips(image, mask)
    chosen = choose_flip(scores, expected)
    measured = f"share of soft tissue under the mask: {_shown(scores)}"
    if chosen is None:
        raise DatasetError(
            f"{case.label}: it is unclear how it lies on {case.image.name} ({measured}); check that both are of one "
            "case and that the image is in HU, or remove the case."
        )
    return chosen.axes, measured


def _shown(scores: Iterable[FlipScore]) -> str:
    return ", ".join(str(score) for score in scores)


def _refuse_other_label_set(label: np.ndarray, case: SourceCase) -> None:
    highest = label.max()
    if 1.5 < highest <= _ZENODO_HIGHEST:
        raise DatasetError(
            f"{case.label}: holds values up to {highest:g}, as the multi-organ labels of Zenodo 1169361 do, which are "
            "incomplete outside a box; give TCIA_pancreas_labels-02-05-2017, which hold 0 and 1."
        )


DATASET = ConvertibleDataset(
    key="Pancreas",
    number=502,
    name="PancreasCT",
    channel="CT",
    derived_channel="CT windowed",  # still CT for the prompts, and not nnU-Net's word for its CT normalisation
    labels={"background": 0, "pancreas": 1},
    optional_labels=frozenset(),
    prompts={"pancreas": "pancreas"},
    licence="CC BY 3.0 (TCIA collection Pancreas-CT, DOI 10.7937/K9/TCIA.2016.tNB1kqBU); name the authors.",
    reference=(
        "Roth, Farag, Turkbey, Lu, Liu, Summers, Data From Pancreas-CT, The Cancer Imaging Archive, 2016; Roth et al., "
        "DeepOrgan: Multi-level Deep Convolutional Networks for Automated Pancreas Segmentation, MICCAI 2015; Clark et "
        "al., The Cancer Imaging Archive (TCIA), Journal of Digital Imaging 2013"
    ),
    find_layouts=find_layouts,
    download=(
        "PANCREAS_00XX/<study>/<series>/*.dcm with label00XX.nii.gz (TCIA), image00XX.nii.gz or PANCREAS_00XX.nii.gz "
        "with label00XX.nii.gz (NIfTI), or image00XX_norm.h5 (MC-Net)"
    ),
)
