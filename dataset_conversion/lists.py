"""train.list and test.list, which semi-supervised repositories ship beside the cases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lgssl_nnunet.dataset_conversion.dataset import TEST, TRAIN
from lgssl_nnunet.problems import Problem, first_of


@dataclass(frozen=True)
class CaseLists:
    """Case names by part, and the file that each list was read from; empty without lists."""

    cases: dict[str, list[str]]
    files: dict[str, Path]


def read_lists(folder: Path) -> CaseLists:
    """Read train.list and test.list in a folder, or in the one above it."""
    files = {}
    for part, name in ((TRAIN, "train.list"), (TEST, "test.list")):
        for place in (folder, folder.parent):
            if part not in files and (place / name).is_file():
                files[part] = place / name
    return CaseLists({part: _names(file) for part, file in files.items()}, files)


def sort_into_parts(available: Iterable[str], lists: CaseLists) -> tuple[dict[str, str], dict[str, str], list[Problem]]:
    """Return the part of each case, the reason of each one left out, and what is wrong with the lists.

    Without lists every case is a training case.
    """
    available = sorted(available)
    if not lists.cases:
        return dict.fromkeys(available, TRAIN), {}, []
    parts: dict[str, str] = {}
    problems = []
    for part, names in lists.cases.items():
        file = str(lists.files[part])
        missing = sorted(set(names).difference(available))
        if missing:
            found = f"names {first_of(missing, 5)}, which the download does not hold"
            problems.append(Problem(file, found, "complete the download or correct the list"))
        for name in names:
            if parts.setdefault(name, part) != part:
                problems.append(Problem(file, f"names {name}, which is a {parts[name]} case", "keep it in one list"))
    left_out = {name: "it is in none of the lists" for name in available if name not in parts}
    return {name: parts[name] for name in available if name in parts}, left_out, problems


def _names(file: Path) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()))
