"""Integrity of a raw dataset: every problem of every case, found before any long work and reported at once.

While a case is read, a print of it is taken, and the prints tell which cases are twins. Held-out images (test and
validation) are read for their prints alone: a twin across training and held-out cases would make the test worthless.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lgssl_nnunet.data.partial_labels import PartialLabel
from lgssl_nnunet.dataset_conversion.geometry import Geometry
from lgssl_nnunet.dataset_conversion.twins import ImagePrint, Twins, find_twins, print_of, report
from lgssl_nnunet.dataset_conversion.volumes import count_not_finite_if_whole, last_line
from lgssl_nnunet.files import content_hash, file_signature, read_json_if_valid, write_json
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.plans.cases import Case, RawDataset, find_reader, held_out_cases
from lgssl_nnunet.plans.dataset_json import label_values
from lgssl_nnunet.plans.partial_labels import label_readings
from lgssl_nnunet.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)

_KEYS_PER_CASE = 3
"""A case may have been read as a labelled, as an unlabelled (left out by a budget) and as a held-out one."""
_MANIFEST_VERSION = 3
"""To be raised when checks or prints change: cases in older manifests are read again."""


@dataclass(frozen=True)
class CheckedCase:
    """What came out of the check of one case.

    Attributes:
        problems: what is wrong with it.
        image_print: what its twins are found by; None if something is wrong.
        hidden: voxels of its label that hold a class which the case does not annotate.
    """

    problems: tuple[Problem, ...]
    image_print: ImagePrint | None = None
    hidden: int = 0


def check_integrity(
    dataset: RawDataset,
    *,
    held_out: Mapping[str, Case] | None = None,
    passed_file: Path | None = None,
    num_processes: int = 0,
    progress: bool = True,
) -> list[list[str]]:
    """Check all training images and the labels of the labelled cases, and look for twins.

    Args:
        dataset: the raw dataset with the budget applied; labels outside the budget are not opened.
        held_out: test and validation cases, which must have no twin in training; their labels are not opened. None for
            the cases in imagesTs.
        passed_file: where to note the cases that passed; those whose files have not changed are not read again.
        num_processes: worker processes; 0 for none.
        progress: show a progress bar.

    Returns:
        The pairs of twins among the training cases.

    Raises:
        DatasetError: lists every problem found, with a remedy.
    """
    problems, pairs = list(dataset.problems), []
    readable = _with_all_files(dataset.cases)
    if readable:
        if held_out is None:
            held_out = held_out_cases(dataset.folder, dataset.dataset_json)
        reading = _Reading(
            find_reader(dataset.dataset_json, next(iter(readable.values())).images[0]),
            _Manifest(passed_file),
            num_processes,
            progress,
        )
        prints, case_problems = _check_cases(dataset, readable, reading)
        pairs, twin_problems = _judge_twins(dataset.name, prints, _held_out_prints(held_out, reading))
        problems += case_problems + twin_problems
    raise_if_any(problems, dataset.name)
    return pairs


class _Manifest:
    """The prints of cases that passed, by case and by a key that changes with the case's files."""

    def __init__(self, file: Path | None) -> None:
        content = read_json_if_valid(file) if file else None
        known = isinstance(content, dict) and content.get("version") == _MANIFEST_VERSION
        self._file = file
        self._cases: dict[str, dict[str, Any]] = content["cases"] if known else {}

    def known(self, keys: Mapping[str, str]) -> dict[str, ImagePrint]:
        """Return the prints of those cases that have passed with these keys."""
        entries = {name: self._cases.get(name, {}).get(key) for name, key in keys.items()}
        return {name: ImagePrint.from_json(entry) for name, entry in entries.items() if entry is not None}

    def add(self, prints: Mapping[str, ImagePrint], keys: Mapping[str, str]) -> None:
        """Note cases that passed and write the file."""
        for name, image_print in prints.items():
            entries = {**self._cases.get(name, {}), keys[name]: image_print.to_json()}
            self._cases[name] = dict(list(entries.items())[-_KEYS_PER_CASE:])
        if self._file is not None and prints:
            write_json({"version": _MANIFEST_VERSION, "cases": dict(sorted(self._cases.items()))}, self._file)


@dataclass(frozen=True)
class _Reading:
    """How cases are read: nnU-Net's reader class, what is known of them already, and with how many processes."""

    reader: type
    manifest: _Manifest
    num_processes: int
    progress: bool


def _with_all_files(cases: Mapping[str, Case]) -> dict[str, Case]:
    return {name: case for name, case in cases.items() if all(path.exists() for path in case.images)}


def _check_cases(
    dataset: RawDataset, cases: Mapping[str, Case], reading: _Reading
) -> tuple[dict[str, ImagePrint], list[Problem]]:
    """Return the prints of the cases that pass and the problems of the others."""
    values = label_values(dataset.dataset_json["labels"])
    partial = label_readings(dataset)
    tasks = {
        name: (case, dataset.num_channels, values, reading.reader, partial.get(name)) for name, case in cases.items()
    }
    keys = {name: _key(*task) for name, task in tasks.items()}
    prints, failed = _prints(check_case, tasks, keys, reading, "Integrity")
    return prints, [problem for name in cases if name in failed for problem in failed[name]]


def _held_out_prints(cases: Mapping[str, Case], reading: _Reading) -> dict[str, ImagePrint]:
    """Return the prints of the images of held-out cases by folder and case; nothing else may be learnt from them."""
    there = {name: case.without_label() for name, case in _with_all_files(cases).items()}
    keys = {name: content_hash([_signatures(case), reading.reader.__name__]) for name, case in there.items()}
    tasks = {name: (case, reading.reader) for name, case in there.items()}
    prints, failed = _prints(print_images, tasks, keys, reading, "Held-out images")
    for problem in (problem for name in sorted(failed) for problem in failed[name]):
        logger.warning("%s: %s, so it is not known whether it has a twin in training.", problem.file, problem.problem)
    return {f"{there[name].images[0].parent.name}/{name}": image_print for name, image_print in prints.items()}


def _prints(
    function: Callable[..., CheckedCase],
    tasks: Mapping[str, tuple],
    keys: Mapping[str, str],
    reading: _Reading,
    description: str,
) -> tuple[dict[str, ImagePrint], dict[str, tuple[Problem, ...]]]:
    """Return the prints of the cases that pass, new or known, and the problems of the others."""
    known = reading.manifest.known(keys)
    todo = {name: task for name, task in tasks.items() if name not in known}
    found, failed = {}, {}
    for name, outcome in run_cases(
        function, todo, num_processes=reading.num_processes, description=description, progress=reading.progress
    ):
        if isinstance(outcome, CaseFailure):
            failed[name] = (Problem(name, f"could not be checked ({outcome.reason})", "repair or remove the case"),)
        elif outcome.problems:
            failed[name] = outcome.problems
        else:
            found[name] = outcome.image_print
            _tell_hidden(name, outcome.hidden)
    reading.manifest.add(found, keys)
    return {**known, **found}, failed


def _judge_twins(
    dataset_name: str, training: Mapping[str, ImagePrint], held_out: Mapping[str, ImagePrint]
) -> tuple[list[list[str]], list[Problem]]:
    """Return the pairs of twins in training, after a warning, and as problems those across training and held-out."""
    twins = find_twins({**training, **held_out})
    inside = [pair for pair in twins if pair.first in training and pair.second in training]
    for sentence in report(inside):
        logger.warning("%s: %s", dataset_name, sentence)
    across = [pair for pair in twins if (pair.first in training) != (pair.second in training)]
    return [[pair.first, pair.second] for pair in inside], [_leak(pair, training) for pair in across]


def _leak(twins: Twins, training: Mapping[str, ImagePrint]) -> Problem:
    inside, outside = (twins.first, twins.second) if twins.first in training else (twins.second, twins.first)
    return Problem(
        outside,
        f"is a test or validation case and a twin of the training case {inside} ({twins.reason})",
        "remove one of the two, or skip the whole integrity check with --no_verify at your own risk",
    )


def _tell_hidden(case: str, voxels: int) -> None:
    if voxels:
        logger.warning(
            "%s: %d voxels of its label hold classes that dataset.json does not name as annotated there; they are "
            "read as unknown.",
            case,
            voxels,
        )


def _key(case: Case, num_channels: int, values: Sequence[int], reader: type, partial: PartialLabel | None) -> str:
    """Return a hash of what the outcome of a case's check depends on."""
    more = [] if partial is None else [partial.replaced]
    return content_hash([_signatures(case), num_channels, list(values), reader.__name__, *more])


def _signatures(case: Case) -> list[list[str | int]]:
    return [file_signature(path) for path in (*case.images, *([case.label] if case.label else []))]


def print_images(case: Case, reader: type) -> CheckedCase:
    """Return the print of the images of one case and what keeps them from being read.

    Args:
        case: the case.
        reader: nnU-Net's reader class.
    """
    problems: list[Problem] = []
    channels = [_read(path, reader, problems) for path in case.images]
    return CheckedCase(tuple(problems), None if problems else _print(channels))


def _print(channels: Sequence[tuple[np.ndarray, Mapping[str, Any]]], label: np.ndarray | None = None) -> ImagePrint:
    images = [image for image, _ in channels]
    image = images[0] if len(images) == 1 else np.concatenate(images)
    return print_of(image, channels[0][1]["spacing"], label)


def check_case(
    case: Case, num_channels: int, values: Sequence[int], reader: type, partial: PartialLabel | None = None
) -> CheckedCase:
    """Return the problems of one case, and its print if it has none.

    Args:
        case: the case; its label is opened only if it has one.
        num_channels: channels that dataset.json declares.
        values: values that the label may hold.
        reader: nnU-Net's reader class.
        partial: how the label is read if it is annotated in part only.
    """
    problems: list[Problem] = []
    channels = [_read(path, reader, problems) for path in case.images]
    images = [(path, *read) for path, read in zip(case.images, channels, strict=True) if read is not None]
    if len(images) == len(case.images):
        found = sum(len(image) for _, image, _ in images)
        if found != num_channels:
            problem = f"has {found} channels instead of {num_channels}"
            problems.append(Problem(_shown(case.images[0]), problem, "correct the images or channel_names"))
    for path, image, properties in images[1:]:
        remedy = "re-export or resample the channels together"
        problems += _geometry_problems(path, image, properties, *images[0], remedy)
    label = None if case.label is None else _read(case.label, reader, problems, is_label=True)
    if label is not None:
        problems += _unknown_values(case.label, label[0], values)
        if images:
            remedy = "resample the label to the image's grid"
            problems += _geometry_problems(case.label, *label, *images[0], remedy)
    if problems:
        return CheckedCase(tuple(problems))
    labels = None if label is None else label[0]
    if labels is None or partial is None:
        return CheckedCase((), _print(channels, labels))
    return CheckedCase((), _print(channels, partial.read(labels)), partial.count_hidden(labels))


def _read(
    path: Path, reader: type, problems: list[Problem], is_label: bool = False
) -> tuple[np.ndarray, dict[str, Any]] | None:
    try:
        wrong = count_not_finite_if_whole(path)
        found = reader().read_seg(str(path)) if is_label else reader().read_images((str(path),))
    except Exception as error:
        problems.append(Problem(_shown(path), f"cannot be read ({last_line(error)})", "copy or export it again"))
        return None
    fault = _geometry(*found).fault
    if fault:
        problems.append(Problem(_shown(path), fault, "correct its header or export it again"))
        return None
    wrong = wrong or int(found[0].size - np.count_nonzero(np.isfinite(found[0])))
    if wrong:
        problem = f"{wrong} voxels are NaN or infinite"
        problems.append(Problem(_shown(path), problem, "replace them by a value that makes sense"))
    return found


def _unknown_values(path: Path, label: np.ndarray, values: Sequence[int]) -> list[Problem]:
    other = label[~np.isin(label, values)]
    unknown = np.unique(other[np.isfinite(other)]).tolist()
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
    mine = _geometry(image, properties)
    differences = mine.differences(_geometry(reference, reference_properties), _shown(reference_path))
    return [Problem(_shown(path), difference, remedy) for difference in differences]


def _geometry(image: np.ndarray, properties: Mapping[str, Any]) -> Geometry:
    """Return the grid of an array (C, X, Y, Z); origin and direction where the format stores them."""
    origin = direction = None
    if "sitk_stuff" in properties:
        origin, direction = (tuple(properties["sitk_stuff"][what]) for what in ("origin", "direction"))
    elif "nibabel_stuff" in properties:
        affine = np.asarray(properties["nibabel_stuff"]["original_affine"])
        axes = affine[:3, :3]
        origin, direction = tuple(affine[:3, 3]), tuple((axes / np.linalg.norm(axes, axis=0)).ravel())
    return Geometry(image.shape[1:], tuple(properties["spacing"]), origin, direction)


def _shown(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
