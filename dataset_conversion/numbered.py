"""Downloads in which the name of a file carries the number of its case: img0001.nii.gz and label0001.nii.gz."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lgssl_nnunet.dataset_conversion.volumes import find_files, volume_name
from lgssl_nnunet.problems import Problem

ENDINGS = (".nii.gz", ".nii")
_MAX_LISTED = 5


@dataclass(frozen=True)
class NumberedFiles:
    """The NIfTI files below a folder.

    Attributes:
        files: file by number, for each kind of file.
        others: files whose names are of no kind.
        problems: numbers that a kind has more than once.
    """

    files: dict[str, dict[int, Path]]
    others: list[Path]
    problems: list[Problem]


def find_numbered(folder: Path, patterns: Mapping[str, str]) -> NumberedFiles:
    """Sort the NIfTI files below a folder by kind and number.

    Args:
        folder: where to look, however deep.
        patterns: per kind, a regular expression for a file's name without ending; its group is the number.
    """
    files: dict[str, dict[int, Path]] = {kind: {} for kind in patterns}
    others, problems = [], []
    for path in find_files(folder, *(f"*{ending}" for ending in ENDINGS)):
        if path.name.startswith("."):  # macOS writes ._NAME beside each file of an archive
            continue
        kind, number = _classify(volume_name(path), patterns)
        if kind is None:
            others.append(path)
        elif (first := files[kind].setdefault(number, path)) != path:
            problems.append(Problem(str(path), f"is the same case as {first}", "remove or rename one of the two"))
    return NumberedFiles({kind: dict(sorted(found.items())) for kind, found in files.items()}, others, problems)


def check_pairs(
    images: Mapping[int, Path], labels: Mapping[int, Path], official: Collection[int], digits: int
) -> tuple[list[str], list[Problem]]:
    """Compare the images and segmentations of a download with the official training cases.

    Args:
        images: images by number.
        labels: segmentations by number.
        official: numbers of the official training cases.
        digits: to write numbers with.

    Returns:
        Warnings about training cases that are missing or not segmented, and a problem for each segmentation without
        an image.
    """
    warnings = []
    missing = set(official).difference(images, labels)
    if missing:
        warnings.append(
            f"The download lacks {len(missing)} of {len(official)} training cases: {join_runs(missing, digits)}."
        )
    without_label = set(official).intersection(images).difference(labels)
    if without_label:
        warnings.append(f"Training cases without a segmentation become unlabelled: {join(without_label, digits)}.")
    return warnings, [
        Problem(str(labels[number]), "has no image", "complete the download or remove it")
        for number in sorted(set(labels).difference(images))
    ]


def ignored(others: Collection[Path]) -> list[str]:
    """Return a warning that names the first of the files that are not part of the download, if there are any."""
    names = [path.name for path in others[:_MAX_LISTED]] if others else []
    more = f" and {len(others) - len(names)} more" if len(others) > len(names) else ""
    return [f"Files with names of another kind are ignored: {', '.join(names)}{more}."] if names else []


def join(numbers: Iterable[int], digits: int) -> str:
    """Return numbers for a message, in order."""
    return ", ".join(f"{number:0{digits}d}" for number in sorted(numbers))


def join_runs(numbers: Iterable[int], digits: int) -> str:
    """Return numbers for a message, in order; three or more in a row as `3 to 9`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]:0{digits}d} to {run[-1]:0{digits}d}" if len(run) > 2 else join(run, digits) for run in runs
    )


def _classify(name: str, patterns: Mapping[str, str]) -> tuple[str | None, int]:
    for kind, pattern in patterns.items():
        match = re.fullmatch(pattern, name)
        if match:
            return kind, int(match[1])
    return None, 0
