"""Working through the cells of a benchmark, beside any number of other processes on the same folder."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import Timeout

from lgssl_nnunet.errors import LGSSLError, TrainingStopped
from lgssl_nnunet.evaluation.benchmark.cell_steps import Execution, run_cell
from lgssl_nnunet.evaluation.benchmark.cells import Cell
from lgssl_nnunet.evaluation.benchmark.provenance import hardware, versions, without_own_folders
from lgssl_nnunet.evaluation.benchmark.records import FAILED, FINISHED, RUNNING, CellStore

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
DIED = "The process that worked on the cell ended without an error, most likely killed because memory ran out."


@dataclass(frozen=True)
class Job:
    """What every worker of one call of a benchmark is given.

    Attributes:
        folder: the benchmark folder.
        cells: all cells in the order in which they are taken.
        execution: how they are computed.
        session: identifier of the call: within one a cell is tried once, in the next one a failed cell again.
        command: the command line, for the records.
        variables: environment variables of the workers (nnU-Net's folders, threads).
        run: what computes a cell.
    """

    folder: Path
    cells: tuple[Cell, ...]
    execution: Execution
    session: str
    command: str
    variables: tuple[tuple[str, str], ...] = ()
    run: Callable[[Cell, Path, Execution], dict[str, Any]] = run_cell


def work(job: Job, *, wait: bool = True) -> None:
    """Take one cell after the other that nobody works on, until every cell is finished or has failed.

    Args:
        job: the cells.
        wait: stay while others work on the last cells, to take them over should their process die; otherwise stay
            only for cells that need the model of such a cell.

    Raises:
        TrainingStopped: a signal or a STOP file ended the training of a cell, which the next call continues.
    """
    pending = list(job.cells)
    parent = os.getppid()
    while pending:
        busy = []
        for cell in list(pending):
            if os.getppid() != parent:  # the benchmark was killed: finish nothing more
                return
            if sources_of(cell, pending):
                continue
            if attempt(job, cell):
                pending.remove(cell)
            else:
                busy.append(cell)
        if not pending or (not wait and len(busy) == len(pending)):
            return
        if busy:
            time.sleep(POLL_SECONDS)


def sources_of(cell: Cell, cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells before this one whose model it learns from (a hyper-parameter `source` names a trainer)."""
    from lgssl_nnunet.registry import find_trainer

    source = dict(cell.settings).get("source", getattr(find_trainer(cell.trainer).hyperparameters, "source", None))
    if source is None:
        return []
    before = cells[: cells.index(cell)] if cell in cells else cells
    return [other for other in before if replace(cell, trainer=source, settings=other.settings) == other]


def attempt(job: Job, cell: Cell) -> bool:
    """Compute a cell unless it is finished, was tried in this session, or another process works on it.

    Returns:
        Whether the cell is settled: finished or failed. False: another process works on it.
    """
    store = CellStore(job.folder, cell)
    try:
        held = store.lock().acquire(blocking=False)
    except Timeout:
        return False
    with held:
        record = store.read()
        if store.is_intact(record):
            return True
        if record is not None and record.get("session") == job.session and record["status"] != FINISHED:
            if record["status"] == RUNNING:  # and nobody holds the lock
                store.write(FAILED, {**_body(record), "error": DIED})
            return True
        _compute(job, store)
        return True


def _compute(job: Job, store: CellStore) -> None:
    """Run the cell's steps and leave a record, whatever they raise."""
    record: dict[str, Any] = {
        "session": job.session,
        "pid": os.getpid(),
        "command": job.command,
        "started": _now(),
    }
    store.write(RUNNING, record)
    with _logged_to(store.log):
        try:
            made_by = {"versions": versions(), "hardware": _hardware(job.execution)}
            record |= made_by | job.run(store.cell, store.prediction, job.execution)
            store.write(FINISHED, record | {"finished": _now(), "files": store.checksums()})
        except TrainingStopped:
            raise  # the cell has not failed: the next call goes on with its training
        except Exception as error:
            logger.exception("The cell failed.")
            named = str(error) if isinstance(error, LGSSLError) else f"{type(error).__name__}: {error}"
            details = without_own_folders(traceback.format_exc())
            failure = {"finished": _now(), "error": without_own_folders(named), "traceback": details}
            store.write(FAILED, record | failure)
    _free_memory()


@contextlib.contextmanager
def _logged_to(file: Path) -> Iterator[None]:
    """Send what the steps log and print to a file, and nowhere else."""
    file.parent.mkdir(parents=True, exist_ok=True)
    package = logging.getLogger("lgssl_nnunet")
    with file.open("a", encoding="utf-8") as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        level, propagate = package.level, package.propagate
        package.addHandler(handler)
        package.setLevel(logging.INFO)
        package.propagate = False  # batchgenerators gives the root logger a handler that prints to the terminal
        try:
            with contextlib.redirect_stdout(stream):
                yield
        finally:
            package.removeHandler(handler)
            package.setLevel(level)
            package.propagate = propagate


def _hardware(execution: Execution) -> dict[str, Any]:
    from lgssl_nnunet.inference.device import choose_device, describe_device

    return hardware(describe_device(choose_device(execution.device)))


def _free_memory() -> None:
    """Give the next cell the GPU memory of this one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _body(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("schema_version", "cell", "status")}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
