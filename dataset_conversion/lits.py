"""LiTS, the Liver Tumor Segmentation Benchmark: abdominal CT of several hospitals, liver and its tumours.

Facts, traps and layouts: datasets.md section 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.dataset_conversion.anatomy import centroid, lies_left_of
from lgssl_nnunet.dataset_conversion.convert import convert
from lgssl_nnunet.dataset_conversion.dataset import (
    TRAIN,
    UNLABELED,
    ConvertibleDataset,
    Layout,
    PreparedCase,
    PrepareOptions,
    SourceCase,
)
from lgssl_nnunet.dataset_conversion.geometry import Geometry, snap
from lgssl_nnunet.dataset_conversion.numbered import check_pairs, find_numbered, ignored, join
from lgssl_nnunet.dataset_conversion.orientation import choose_flip, rank_flips
from lgssl_nnunet.dataset_conversion.volumes import is_integer, read_volume
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.problems import Problem

TRAINING_IDS = frozenset(range(131))
LOWEST, HIGHEST = -1100, 3100
"""Values in HU beyond which something other than a patient was stored."""
_PATTERNS = {"image": r"volume-(\d+)", "label": r"segmentation-(\d+)", "test": r"test-volume-(\d+)"}
_BODY = -500
"""HU: above are tissue, bone and table, below are air and lung."""
_SPACING_UNKNOWN = (
    "spacing unknown: the header says 1 mm and no orientation, as it does where LiTS erased the geometry of scans of "
    "3D-IRCADb-01; leave this case out of results in mm"
)


def convert_lits(download: Path | str, **options: Any) -> Path:
    """Convert LiTS; options and result as in `lgssl_nnunet.convert_dataset`."""
    return convert(DATASET, download, **options)


def find_layouts(download: Path) -> tuple[list[Layout], list[Problem]]:
    """Return the one known layout, volume-N and segmentation-N in any folders, and the problems of its files."""
    found = find_numbered(download, _PATTERNS)
    images, labels, tests = (found.files[kind] for kind in _PATTERNS)
    if not images and not tests:
        return [], []
    warnings, problems = check_pairs(images, labels, TRAINING_IDS, 1)
    foreign = sorted(set(images) - TRAINING_IDS)
    if foreign:
        problems.append(_foreign(download, foreign))
    cases = [_training_case(number, image, labels.get(number)) for number, image in images.items()]
    cases += [SourceCase(f"liver_test_{number:03d}", image, part=UNLABELED) for number, image in tests.items()]
    warnings += [*_warn_of_lost_geometry(cases), *ignored(found.others)]
    layout = Layout("challenge NIfTI", tuple(cases), prepare_case, warnings=tuple(warnings))
    return [layout], [*found.problems, *problems]


def prepare_case(case: SourceCase, options: PrepareOptions) -> PreparedCase:
    """Read a case; a segmentation that lost its geometry gets the image's, if it fits there."""
    image = read_volume(case.image)
    warnings = _warn_of_intensities(image)
    is_lost = has_lost_geometry(Geometry.of(image))
    if is_lost:
        warnings.append(_SPACING_UNKNOWN)
    if case.label is None:
        return PreparedCase(image, warnings=tuple(warnings), image_as_is=True)
    stored = read_volume(case.label)
    label, changes = _with_geometry_of(image, stored, case)
    if not is_lost:
        warnings += _warn_of_side(image, label)
    as_is = label is stored and is_integer(stored)
    return PreparedCase(image, label, tuple(changes), tuple(warnings), image_as_is=True, label_as_is=as_is)


def has_lost_geometry(geometry: Geometry) -> bool:
    """Whether a NIfTI header says nothing: spacing 1 and axes along those of the world.

    Which way the axes point differs between an identity matrix, a header without a matrix and what libraries write for
    it, so signs do not count.
    """
    return bool(np.allclose(geometry.spacing, 1) and np.allclose(np.abs(geometry.direction), np.eye(3).ravel()))


def _training_case(number: int, image: Path, label: Path | None) -> SourceCase:
    return SourceCase(f"liver_{number:03d}", image, label, TRAIN if label else UNLABELED)


def _foreign(download: Path, numbers: Iterable[int]) -> Problem:
    found = f"holds the volumes {join(numbers, 1)}, which LiTS does not have (0 to 130)"
    return Problem(str(download), found, "remove them, or give them as images without segmentations with --unlabeled")


def _warn_of_lost_geometry(cases: Iterable[SourceCase]) -> list[str]:
    lost = [case.identifier for case in cases if (geometry := _geometry_in(case.image)) and has_lost_geometry(geometry)]
    if not lost:
        return []
    return [
        f"Spacing and orientation of {len(lost)} cases are unknown (header with spacing 1), so leave them out of "
        f"results in mm: {', '.join(lost)}. LiTS erased them for 28 to 47, which are scans of 3D-IRCADb-01, so that "
        "dataset is no independent test set."
    ]


def _geometry_in(path: Path) -> Geometry | None:
    """Return the geometry in a file's header; None if it is not that of one volume, which reading will report."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    if reader.GetDimension() != 3:
        return None
    return Geometry(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def _with_geometry_of(image: sitk.Image, label: sitk.Image, case: SourceCase) -> tuple[sitk.Image, list[str]]:
    """Return the segmentation, in the image's geometry if it lost its own, and what was changed.

    Raises:
        DatasetError: it lost its geometry, and its voxels do not fit those of the image as they are stored.
    """
    mine, other = Geometry.of(label), Geometry.of(image)
    mask = sitk.GetArrayViewFromImage(label) > 0.5
    if mine.matches(other) or mine.size != other.size or not has_lost_geometry(mine) or not mask.any():
        return label, []  # nothing to repair, or something that is refused for every dataset
    scores = rank_flips(sitk.GetArrayViewFromImage(image), mask)
    best = choose_flip(scores)
    if best is None or best.axes:
        ranking = ", ".join(str(score) for score in scores[:3])
        raise DatasetError(
            f"{case.label}: its header says nothing, and its voxels do not clearly lie in soft tissue of "
            f"{case.image.name} as stored (share by version: {ranking}); give it the image's geometry by hand."
        )
    return snap(label, image), [
        f"the segmentation's header said nothing (spacing 1); it got the image's geometry, in which "
        f"{best.share:.0%} of it lie in soft tissue"
    ]


def _warn_of_intensities(image: sitk.Image) -> list[str]:
    array = sitk.GetArrayViewFromImage(image)
    low, high = array.min(), array.max()
    if low >= LOWEST and high <= HIGHEST:
        return []
    return [f"intensities from {low:g} to {high:g} go beyond what a CT shows of a patient; they are kept"]


def _warn_of_side(image: sitk.Image, label: sitk.Image) -> list[str]:
    """Warn of a liver in the left half of the body; a few people are built like that, so nothing is refused."""
    if image.GetSize() != label.GetSize():
        return []
    body = centroid(sitk.GetArrayViewFromImage(image) > _BODY, image)
    liver = centroid(sitk.GetArrayViewFromImage(label) > 0.5, image)
    if not lies_left_of(liver, body):
        return []
    return ["by its header the liver lies in the left half of the body; the orientation may be wrong"]


DATASET = ConvertibleDataset(
    key="LiTS",
    number=504,
    name="LiTS",
    channel="CT",
    derived_channel="CT",
    labels={"background": 0, "liver": 1, "liver tumour": 2},
    optional_labels=frozenset({"liver tumour"}),
    prompts={"liver": "liver", "liver tumour": "liver tumour"},
    licence="CC BY-NC-ND 4.0: not for commercial use, and converted data must not be passed on.",
    reference=("Bilic et al., The Liver Tumor Segmentation Benchmark (LiTS), Medical Image Analysis 84, 102680, 2023"),
    find_layouts=find_layouts,
    download=(
        "volume-0.nii and segmentation-0.nii (Training Batch 1 and 2) and test-volume-0.nii, in these or other folders"
    ),
)
