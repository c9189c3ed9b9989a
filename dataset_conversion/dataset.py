"""What a converter declares: the dataset, the layouts it knows, and the cases that it found in a download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import SimpleITK as sitk

from lgssl_nnunet.problems import Problem

TRAIN, TEST, UNLABELED = "train", "test", "unlabeled"
IMAGE_FOLDERS = {TRAIN: "imagesTr", TEST: "imagesTs", UNLABELED: "imagesUn"}
LABEL_FOLDERS = {TRAIN: "labelsTr", TEST: "labelsTs"}


@dataclass(frozen=True)
class SourceCase:
    """One case as it lies in a download.

    Attributes:
        identifier: name of the case in the raw dataset.
        image: image file, or the folder of a DICOM series.
        label: segmentation file; None if the download has none.
        part: `TRAIN` (imagesTr), `TEST` (imagesTs) or `UNLABELED` (imagesUn).
    """

    identifier: str
    image: Path
    label: Path | None = None
    part: str = TRAIN


@dataclass(frozen=True)
class PrepareOptions:
    """What holds for every case of a conversion.

    Attributes:
        spacing: spacing (x, y, z) in mm that replaces a lost one; None keeps the header's.
    """

    spacing: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class PreparedCase:
    """A case in memory, as it will be written.

    Attributes:
        image: the image in its final geometry.
        label: the segmentation on the image's grid, as read (values are checked later); None without one.
        changes: what was changed against the files, in words; empty if nothing was.
        warnings: what a person should know about this case.
        image_as_is: the image file can be linked or copied, since no voxel and no header entry changes.
        label_as_is: the same for the label file.
    """

    image: sitk.Image
    label: sitk.Image | None = None
    changes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    image_as_is: bool = False
    label_as_is: bool = False


Prepare = Callable[[SourceCase, PrepareOptions], PreparedCase]
"""Reads and repairs one case; a module-level function, because worker processes call it."""


@dataclass(frozen=True)
class Layout:
    """A way of storing a dataset, with the cases found in it.

    Attributes:
        name: the layout in words, for the log and the record.
        cases: the cases found.
        prepare: reads and repairs one case.
        left_out: reason by case or file that is not converted.
        processing: what was done to the voxels before; empty for the scanner's own values.
        spacing: documented spacing (x, y, z) in mm of a layout that lost it; None if headers can be believed.
        warnings: what a person should know about the whole download.
        extra: further images without segmentations, in no particular layout.
    """

    name: str
    cases: tuple[SourceCase, ...]
    prepare: Prepare
    left_out: Mapping[str, str] = field(default_factory=dict)
    processing: str = ""
    spacing: tuple[float, float, float] | None = None
    warnings: tuple[str, ...] = ()
    extra: tuple[SourceCase, ...] = ()

    @property
    def all_cases(self) -> tuple[SourceCase, ...]:
        """The cases of the layout and the extra ones."""
        return (*self.cases, *self.extra)


@dataclass(frozen=True)
class ConvertibleDataset:
    """A published dataset: what dataset.json says, and how its downloads are recognised.

    Attributes:
        key: name on the command line.
        number: default id of the raw dataset.
        name: the folder is DatasetNNN_NAME.
        channel: nnU-Net's channel name; `CT` chooses its CT normalisation.
        derived_channel: channel name for copies that were windowed before, which must not get it.
        labels: value by class name, background included.
        optional_labels: classes that a case may lack; of the others, each case must show all.
        prompts: prompt by class name.
        licence: terms of use.
        reference: what to cite.
        find_layouts: returns every layout that a folder holds, and the problems of its files.
        download: what the download looks like, for messages.
    """

    key: str
    number: int
    name: str
    channel: str
    derived_channel: str
    labels: Mapping[str, int]
    optional_labels: frozenset[str]
    prompts: Mapping[str, str]
    licence: str
    reference: str
    find_layouts: Callable[[Path], tuple[list[Layout], list[Problem]]]
    download: str

    def folder_name(self, number: int | None = None) -> str:
        """Return the name of the raw dataset's folder, DatasetNNN_NAME."""
        return f"Dataset{self.number if number is None else number:03d}_{self.name}"
