"""Several workers on one machine: each a process of its own, with its share of the cores."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from types import FrameType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lgssl_nnunet.errors import LGSSLError, TrainingStopped
from lgssl_nnunet.evaluation.benchmark.records import FAILED, FINISHED, RUNNING, CellStore
from lgssl_nnunet.evaluation.benchmark.worker import Job, attempt, work
from lgssl_nnunet.files import environment
from lgssl_nnunet.signals import INTERRUPTED, handling

logger = logging.getLogger(__name__)

MOST_DATA_WORKERS = 12
"""nnU-Net's own number of data workers on a machine that it does not know."""


def divided_cores(workers: int) -> dict[str, str]:
    """Return the variables that share the cores among workers: threads and data workers; what the user set stays."""
    cores = os.cpu_count() or 1
    shares = {"OMP_NUM_THREADS": cores // workers, "nnUNet_n_proc_DA": min(MOST_DATA_WORKERS, cores) // workers}
    return {name: os.environ.get(name) or str(max(1, share)) for name, share in shares.items()}


def run_workers(job: Job, workers: int, progress: bool) -> None:
    """Work through the cells with worker processes, and replace one that dies.

    Raises:
        LGSSLError: a worker died before it took a cell.
    """
    context = multiprocessing.get_context("spawn")

    def start(index: int) -> BaseProcess:
        process = context.Process(target=_work_as, args=(job, index), name=f"benchmark worker {index}")
        with environment(dict(job.variables)):
            process.start()
        return process

    processes = [start(index) for index in range(min(workers, len(job.cells)))]

    def replace_the_dead() -> bool:
        for index, process in enumerate(processes):
            if process.exitcode not in (None, 0, TrainingStopped.exit_code):
                _settle_what_it_left(job, process)
                processes[index] = start(index)
        return any(process.is_alive() for process in processes)

    try:
        with handling([signal.SIGTERM], _interrupt):  # ends this process as Ctrl-C does, and the workers with it
            watch(job, replace_the_dead, progress)
    finally:
        for process in processes:
            process.terminate()  # a training finishes its step and saves; a second signal to it changes nothing
        for process in processes:
            process.join()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _work_as(job: Job, index: int) -> None:
    """Work in a new process; with several GPUs each worker takes one, in turn."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if job.execution.device is None and gpus > 1:
        job = replace(job, execution=replace(job.execution, device=f"cuda:{index % gpus}"))
    try:
        work(job)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except TrainingStopped as stopped:
        logger.warning("%s", stopped)
        raise SystemExit(TrainingStopped.exit_code) from None


def _settle_what_it_left(job: Job, process: BaseProcess) -> None:
    """Record the cell of a dead worker as failed, so that the next worker does not die of it too."""
    stores = [CellStore(job.folder, cell) for cell in job.cells]
    taken = [store for store in stores if _was_taken_by(store, job.session, process.pid)]
    if not taken:
        raise LGSSLError(
            f"A {process.name} died before it took a cell (exit code {process.exitcode}); --workers 0 runs everything "
            "in this process and shows why, and in a script call from under `if __name__ == '__main__':`."
        )
    for store in taken:
        if _status(store, job.session) == RUNNING:
            attempt(job, store.cell)


def _was_taken_by(store: CellStore, session: str, pid: int | None) -> bool:
    record = store.read()
    return record is not None and record.get("session") == session and record.get("pid") == pid


def watch(job: Job, goes_on: Callable[[], bool], progress: bool) -> None:
    """Show a bar over the cells, and a line for each that begins or ends, until `goes_on` returns False."""
    seen: dict[str, str | None] = {}
    with bar_over_cells(job, progress) as bar:
        alive = True
        while alive:
            alive = goes_on()
            for cell in job.cells:
                store = CellStore(job.folder, cell)
                status = _status(store, job.session)
                if status != seen.get(cell.name):
                    seen[cell.name] = status
                    report(store, status)
            bar.n = sum(status in (FINISHED, FAILED) for status in seen.values())
            bar.refresh()
            if alive:
                time.sleep(1)


@contextmanager
def bar_over_cells(job: Job, progress: bool) -> Iterator[tqdm]:
    """Show a progress bar over the cells with which log messages do not collide."""
    with (
        logging_redirect_tqdm([logging.getLogger("lgssl_nnunet")]),
        tqdm(total=len(job.cells), desc="Benchmark", unit="cell", disable=not progress) as bar,
    ):
        yield bar


def report(store: CellStore, status: str | None) -> None:
    """Say in one line what has become of a cell."""
    record = store.read() or {}
    if status == RUNNING:
        logger.info("%s: begun, see %s", store.cell, store.log)
    elif status == FINISHED:
        logger.info("%s: Dice %.4f%s", store.cell, record["dice"], _how(record))
    elif status == FAILED:
        logger.error("%s: failed: %s", store.cell, record["error"])


def _how(record: dict) -> str:
    return " (trained before)" if record.get("adopted") else ""


def _status(store: CellStore, session: str) -> str | None:
    """Return the status of a cell; what another session left unfinished counts as nothing."""
    record = store.read()
    if record is None or (record["status"] != FINISHED and record.get("session") != session):
        return None
    return record["status"]
