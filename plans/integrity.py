"""Integrity of a raw dataset: every problem of every case, found before any long work and reported at once."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from lgssl_nnunet.files import content_hash, file_signature, read_json_if_valid, write_json
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.plans.cases import Case, RawDataset, find_reader
from lgssl_nnunet.plans.dataset_json import label_values
from lgssl_nnunet.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)

_GZIP_CHUNK = 1 << 22
_SPACING_TOLERANCE = 1e-3
"""Relative; headers round to a few digits."""
_ORIGIN_TOLERANCE = 0.1
"""In voxels: less cannot move a label by a voxel."""
_DIRECTION_TOLERANCE = 1e-3
_KEYS_PER_CASE = 2
"""A case may have passed as a labelled one and, left out by another budget, as an unlabelled one."""


def check_integrity(
    dataset: RawDataset, *, passed_file: Path | None = None, num_processes: int = 0, progress: bool = True
) -> None:
    """Check all training images and the labels of the labelled cases.

    Args:
        dataset: the raw dataset with the budget applied; labels outside the budget are not opened.
        passed_file: where to note the cases that passed; those whose files have not changed are not read again.
        num_processes: worker processes; 0 for none.
        progress: show a progress bar.

    Raises:
        DatasetError: lists every problem found, with a remedy.
    """
    problems = list(dataset.problems)
    readable = {name: case for name, case in dataset.cases.items() if all(path.exists() for path in case.images)}
    if readable:
        problems += _check_cases(dataset, readable, passed_file, num_processes, progress)
    raise_if_any(problems, dataset.name)


def _check_cases(
    dataset: RawDataset, cases: Mapping[str, Case], passed_file: Path | None, num_processes: int, progress: bool
) -> list[Problem]:
    reader = find_reader(dataset.dataset_json, next(iter(cases.values())).images[0])
    values = label_values(dataset.dataset_json["labels"])
    keys = {name: _key(case, dataset.num_channels, values, reader) for name, case in cases.items()}
    noted = read_json_if_valid(passed_file) if passed_file else None
    passed = noted if isinstance(noted, dict) else {}
    todo = [name for name in cases if keys[name] not in passed.get(name, [])]
    tasks = {name: (cases[name], dataset.num_channels, values, reader) for name in todo}
    found = dict(run_cases(check_case, tasks, num_processes=num_processes, description="Integrity", progress=progress))
    problems = []
    for name in todo:
        outcome = found[name]
        if isinstance(outcome, CaseFailure):
            outcome = [Problem(name, f"could not be checked ({outcome.reason})", "repair or remove the case")]
        if not outcome:
            passed[name] = [*passed.get(name, []), keys[name]][-_KEYS_PER_CASE:]
        problems += outcome
    if passed_file is not None and todo:
        write_json(dict(sorted(passed.items())), passed_file)
    return problems


def _key(case: Case, num_channels: int, values: Sequence[int], reader: type) -> str:
    """Return a hash of what the outcome of a case's check depends on."""
    files = [file_signature(path) for path in (*case.images, *([case.label] if case.label else []))]
    return content_hash([files, num_channels, list(values), reader.__name__])


def check_case(case: Case, num_channels: int, values: Sequence[int], reader: type) -> list[Problem]:
    """Return the problems of one case.

    Args:
        case: the case; its label is opened only if it has one.
        num_channels: channels that dataset.json declares.
        values: values that the label may hold.
        reader: nnU-Net's reader class.
    """
    problems: list[Problem] = []
    channels = [_read(path, reader, problems) for path in case.images]
    images = [(path, *read) for path, read in zip(case.images, channels, strict=True) if read is not None]
    for path, image, _ in images:
        problems += _value_problems(path, image)
    if len(images) == len(case.images):
        found = sum(len(image) for _, image, _ in images)
        if found != num_channels:
            problem = f"has {found} channels instead of {num_channels}"
            problems.append(Problem(_shown(case.images[0]), problem, "correct the images or channel_names"))
    for path, image, properties in images[1:]:
        remedy = "re-export or resample the channels together"
        problems += _geometry_problems(path, image, properties, *images[0], remedy)
    if case.label is not None:
        label = _read(case.label, reader, problems, is_label=True)
        if label is not None:
            problems += _value_problems(case.label, label[0])
            problems += _unknown_values(case.label, label[0], values)
            if images:
                remedy = "resample the label to the image's grid"
                problems += _geometry_problems(case.label, *label, *images[0], remedy)
    return problems


def _read(
    path: Path, reader: type, problems: list[Problem], is_label: bool = False
) -> tuple[np.ndarray, dict[str, Any]] | None:
    try:
        _require_whole_gzip(path)
        return reader().read_seg(str(path)) if is_label else reader().read_images((str(path),))
    except Exception as error:
        problems.append(Problem(_shown(path), f"cannot be read ({_first_line(error)})", "copy or export it again"))
        return None


def _require_whole_gzip(path: Path) -> None:
    """Raise if a compressed file is cut off or damaged; SimpleITK would fill the rest of the image with zeros."""
    if path.suffix != ".gz":
        return
    with gzip.open(path) as stream:
        while stream.read(_GZIP_CHUNK):
            pass


def _value_problems(path: Path, image: np.ndarray) -> list[Problem]:
    wrong = count_stored_not_finite(path) or _count_not_finite(image)
    if not wrong:
        return []
    problem = f"{wrong} voxels are NaN or infinite"
    return [Problem(_shown(path), problem, "replace them by a value that makes sense")]


def count_stored_not_finite(path: Path) -> int:
    """Count the NaN and infinite voxels that a NIfTI file stores: ITK turns them into 0 when it reads one."""
    if not path.name.endswith((".nii", ".nii.gz")):
        return 0
    image = nib.load(path)
    return _count_not_finite(image.dataobj.get_unscaled()) if image.get_data_dtype().kind == "f" else 0


def _count_not_finite(image: np.ndarray) -> int:
    return int(image.size - np.count_nonzero(np.isfinite(image)))


def _unknown_values(path: Path, label: np.ndarray, values: Sequence[int]) -> list[Problem]:
    unknown = sorted(set(np.unique(label[np.isfinite(label)]).tolist()).difference(values))
    if not unknown:
        return []
    shown = ", ".join(f"{value:g}" for value in unknown[:5]) + (" and more" if len(unknown) > 5 else "")
    problem = f"holds the value {shown}, which dataset.json does not know"
    return [Problem(_shown(path), problem, "correct the label file or add the value to labels")]


def _geometry_problems(
    path: Path,
    image: np.ndarray,
    properties: Mapping[str, Any],
    reference_path: Path,
    reference: np.ndarray,
    reference_properties: Mapping[str, Any],
    remedy: str,
) -> list[Problem]:
    """Compare the grids of two files of one case; arrays are (C, X, Y, Z)."""
    name, other = _shown(path), _shown(reference_path)
    if image.shape[1:] != reference.shape[1:]:
        difference = f"has shape {list(image.shape[1:])} and {other} has {list(reference.shape[1:])}"
        return [Problem(name, difference, remedy)]
    spacing = np.asarray(reference_properties["spacing"], dtype=float)
    if not np.allclose(properties["spacing"], spacing, rtol=_SPACING_TOLERANCE, atol=0):
        difference = f"has spacing {_rounded(properties['spacing'])} mm and {other} has {_rounded(spacing)} mm"
        return [Problem(name, difference, remedy)]
    problems = []
    mine, theirs = _placement(properties), _placement(reference_properties)
    for what, tolerance in (("origin", _ORIGIN_TOLERANCE * spacing.min()), ("direction", _DIRECTION_TOLERANCE)):
        if what in mine and what in theirs and not np.allclose(mine[what], theirs[what], rtol=0, atol=tolerance):
            difference = f"has {what} {_rounded(mine[what])} and {other} has {_rounded(theirs[what])}"
            problems.append(Problem(name, difference, remedy))
    return problems


def _placement(properties: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return origin in mm and direction cosines where the format stores them."""
    if "sitk_stuff" in properties:
        stored = properties["sitk_stuff"]
        return {"origin": np.asarray(stored["origin"]), "direction": np.asarray(stored["direction"])}
    if "nibabel_stuff" in properties:
        affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
        axes = affine[:3, :3]
        return {"origin": affine[:3, 3], "direction": (axes / np.linalg.norm(axes, axis=0)).ravel()}
    return {}


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _rounded(numbers: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(number), 4) for number in np.ravel(numbers)]


def _first_line(error: Exception) -> str:
    """Return the last line of a message: ITK and nibabel put where it happened first and what happened last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
