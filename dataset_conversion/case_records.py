"""Filling a raw dataset case by case: whole files, records, resuming, failures named at the end.

Converting a download and merging datasets share this.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgssl_nnunet.dataset_conversion.volumes import require_whole_nifti
from lgssl_nnunet.errors import DatasetError, LGSSLError, UsageError
from lgssl_nnunet.files import (
    file_record,
    is_unchanged,
    read_json_if_valid,
    warn_if_disk_is_full,
    write_atomically,
    write_json,
)
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.paths import dataset_number

logger = logging.getLogger(__name__)

_SPACE_MARGIN = 1.2
"""Compressed output is about as large as the compressed source; this much more is asked for."""


@dataclass(frozen=True)
class CaseRecords:
    """A JSON file per case of a raw dataset, which says what it was made from and which files it has.

    Attributes:
        target: folder of the raw dataset.
        name: of the folder with the records in it.
        done: what is done to a case, for messages, such as "converted".
        source: name of the file in the same folder that says what is done there at all.
    """

    target: Path
    name: str
    done: str
    source: str

    @property
    def source_file(self) -> Path:
        """Where it is written what the target is filled with."""
        return self.target / self.name / self.source

    def file(self, case: str) -> Path:
        """Return where the record of a case goes."""
        return self.target / self.name / f"{case}.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """Return the record of every case in the target."""
        files = sorted((self.target / self.name).glob("*.json"))
        found = {file.stem: read_json_if_valid(file) for file in files if file != self.source_file}
        return {name: record for name, record in found.items() if record}

    def write(self, case: str, record: Mapping[str, Any], files: Iterable[Path]) -> dict[str, Any]:
        """Write and return the record of a case whose files are all there.

        Args:
            case: its identifier.
            record: `key`, what the files depend on, and what else is to be known of the case.
            files: what was written; what an earlier record has beyond that is removed, so that no case is in two
                folders.
        """
        written = {file.relative_to(self.target).as_posix(): _file_record(file) for file in files}
        self._remove_files(case, kept=written)
        complete = {**record, "files": written}
        write_json(complete, self.file(case))
        return complete

    def remove(self, case: str) -> None:
        """Remove a case: its files and its record."""
        self._remove_files(case, kept=())
        self.file(case).unlink(missing_ok=True)

    def unfinished(self, keys: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Return the cases that are not there yet, or were made from other files or in another way.

        Args:
            keys: what the outcome of each case depends on.
        """
        todo = []
        for case, key in keys.items():
            record = read_json_if_valid(self.file(case)) or {}
            if record.get("key") != key:
                todo.append(case)
                continue
            files = record.get("files", [])
            files = files if isinstance(files, dict) else dict.fromkeys(files)  # records of 0.1.0 hold names only
            changed = [name for name, written in files.items() if not is_unchanged(self.target / name, written)]
            if changed:
                todo.append(case)
                logger.warning("%s: %s is missing or not as written; %s again.", case, changed[0], self.done)
        there = len(keys) - len(todo)
        if there:
            logger.info("%d cases are %s already; %d are to be done.", there, self.done, len(todo))
        return todo

    def make(
        self,
        function: Callable[..., dict[str, Any]],
        tasks: Mapping[str, tuple],
        *,
        num_processes: int | None,
        description: str,
        progress: bool,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Call `function` for every case and yield the records as they come; name those that failed at the end.

        Args:
            function: makes one case and returns its record; a module-level function.
            tasks: its arguments by case.
            num_processes: worker processes; None for at most 8, one per core.
            description: label of the progress bar.
            progress: show it.

        Raises:
            DatasetError: some cases failed, after all others were done.
        """
        processes = min(8, os.cpu_count() or 1) if num_processes is None else num_processes
        failed = {}
        for case, outcome in run_cases(
            function, tasks, num_processes=processes, description=description, progress=progress
        ):
            if isinstance(outcome, CaseFailure):
                failed[case] = outcome
            else:
                yield case, outcome
        if failed:
            self._raise(failed, len(tasks))

    def _raise(self, failed: Mapping[str, CaseFailure], total: int) -> None:
        for name in sorted(failed):
            logger.debug("%s was not %s:\n%s", name, self.done, failed[name].details)
        warn_if_disk_is_full(self.target)
        lines = [f"  {name}: {failed[name].reason}" for name in sorted(failed)]
        raise DatasetError(
            f"{len(failed)} of {total} cases were not {self.done} (the others are done and kept; run the command "
            "again after repairing these):\n" + "\n".join(lines)
        )

    def _remove_files(self, case: str, kept: Iterable[str]) -> None:
        earlier = read_json_if_valid(self.file(case)) or {}
        for name in set(earlier.get("files", [])).difference(kept):
            (self.target / name).unlink(missing_ok=True)


def write_volume(target: Path, file_ending: str, write: Callable[[Path], Any]) -> None:
    """Write an image file in one step.

    Args:
        target: the file.
        file_ending: of a name that `write` is given, since libraries choose the format by it.
        write: writes the file under that name.
    """

    def whole(temporary: Path) -> None:
        named = temporary.with_name(temporary.name + file_ending)
        try:
            write(named)
            require_whole_nifti(named)  # on a full disk ITK writes the beginning of the file and reports no error
            os.replace(named, temporary)
        finally:
            named.unlink(missing_ok=True)

    write_atomically(target, whole)


def refuse_taken_number(target: Path, flag: str) -> None:
    """Refuse a raw dataset whose id another folder beside it has.

    Args:
        target: folder of the raw dataset, which need not exist.
        flag: what the id was given with.

    Raises:
        UsageError: names that folder.
    """
    number = dataset_number(target.name)
    for other in sorted(target.parent.glob("Dataset*")) if target.parent.is_dir() else []:
        if other != target and dataset_number(other.name) == number:
            raise UsageError(f"{other}: has the id {number} already; choose another id with {flag}.")


def require_space(target: Path, files: Iterable[Path], remedy: str) -> None:
    """Refuse before anything is written if the disk cannot take copies of some files.

    Args:
        target: the folder to write to, which need not exist.
        files: what is copied, or written in about the same size.
        remedy: what to do about it.

    Raises:
        LGSSLError: says how much is free and needed.
    """
    needed = int(_SPACE_MARGIN * sum(file.stat().st_size for file in files))
    existing = next(folder for folder in (target, *target.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise LGSSLError(
            f"{existing}: {free / 1e9:.1f} GB are free and about {needed / 1e9:.1f} GB are needed; {remedy}."
        )


def _file_record(file: Path) -> dict[str, Any] | None:
    """Return what tells whether a written file has changed; of a link the record's key tells that already."""
    return None if file.is_symlink() else file_record(file)
