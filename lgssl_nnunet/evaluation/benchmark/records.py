"""What a benchmark folder holds: a record and the predictions of each cell, and who works on which.

    FOLDER/cells/NAME/cell.json      the record: identity, status, times, versions, hardware, checksums
    FOLDER/cells/NAME/prediction/    segmentations of the test cases, summary.json, summary_per_case.csv
    FOLDER/cells/NAME/log.txt        what the steps said
    FOLDER/locks/NAME.lock           held by the process that works on the cell, released when it ends or dies

A cell is finished when its record says so and every file that the record names still has its checksum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from lgssl_nnunet.evaluation.benchmark.cells import Cell, cell_from_identity
from lgssl_nnunet.files import read_json_if_valid, sha256, write_json

SCHEMA_VERSION = 1
RUNNING, FINISHED, FAILED = "running", "finished", "failed"
CASES_FILE = "summary_per_case.csv"


@dataclass(frozen=True)
class CellStore:
    """The place of one cell in a benchmark folder.

    Attributes:
        folder: the benchmark folder.
        cell: the cell.
    """

    folder: Path
    cell: Cell

    @property
    def place(self) -> Path:
        """The cell's own folder."""
        return self.folder / "cells" / self.cell.name

    @property
    def prediction(self) -> Path:
        """Where the segmentations of the test cases and their evaluation lie."""
        return self.place / "prediction"

    @property
    def cases_file(self) -> Path:
        """The table with a row per case and class."""
        return self.prediction / CASES_FILE

    @property
    def log(self) -> Path:
        """What the steps said."""
        return self.place / "log.txt"

    def lock(self) -> FileLock:
        """Return the cell's lock, not yet acquired; the system releases it when the process that holds it dies."""
        file = self.folder / "locks" / f"{self.cell.name}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(file)

    def read(self) -> dict[str, Any] | None:
        """Return the record; None if it is missing, damaged, or of another cell."""
        record = read_json_if_valid(self.place / "cell.json")
        if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
            return None
        return record if record.get("cell") == self.cell.identity() else None

    def write(self, status: str, content: Mapping[str, Any]) -> None:
        """Replace the record in one step."""
        head = {"schema_version": SCHEMA_VERSION, "cell": self.cell.identity(), "status": status}
        write_json({**head, **content}, self.place / "cell.json")

    def checksums(self) -> dict[str, str]:
        """Return the SHA-256 of each file among the predictions, by name."""
        files = sorted(file for file in self.prediction.iterdir() if file.is_file())
        return {file.name: sha256(file) for file in files}

    def is_intact(self, record: Mapping[str, Any] | None) -> bool:
        """Whether the record says finished and every file that it names is there, unchanged."""
        if record is None or record["status"] != FINISHED or not self.prediction.is_dir():
            return False
        recorded, present = record.get("files") or {}, self.checksums()
        return CASES_FILE in recorded and all(present.get(name) == value for name, value in recorded.items())


def all_records(folder: Path) -> list[tuple[CellStore, dict[str, Any]]]:
    """Return every cell of a benchmark folder that has a valid record, in order of the cells' names."""
    found = []
    for file in sorted(folder.glob("cells/*/cell.json")):
        content = read_json_if_valid(file)
        try:
            store = CellStore(folder, cell_from_identity(content["cell"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        record = store.read()
        if record is not None and store.place == file.parent:
            found.append((store, record))
    return found
