"""Starting the processes of a training on one machine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from types import FrameType
from typing import Any

import torch
from nnunetv2.run.run_training import find_free_network_port
from torch import multiprocessing
from torch.multiprocessing import ProcessExitedException

from lgssl_nnunet.console import console_level, start_console_logging
from lgssl_nnunet.engine.interruption import SIGNALS
from lgssl_nnunet.errors import LGSSLError, TrainingError
from lgssl_nnunet.signals import INTERRUPTED, handling


def launch(function: Callable[..., Any], number: int, arguments: Mapping[str, Any]) -> None:
    """Call a function in `number` new processes that can form a group, and wait for them.

    Each finds in its environment what torchrun would tell it. If one fails, the others are ended. Signals are passed on
    to all of them.

    Args:
        function: importable by its name.
        number: of processes.
        arguments: by name; the same in each process.

    Raises:
        LGSSLError: what the process that failed first raised.
        TrainingError: a process was killed.
    """
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells of each process that it ends
    shared = (function, number, find_free_network_port(), dict(arguments), console_level(), failures)
    started = multiprocessing.start_processes(_run, shared, number, join=False, start_method="spawn")
    with _passing_signals_on(started.processes):
        try:
            while not started.join():
                pass
        except ProcessExitedException as error:
            if failures.empty():
                raise _without_a_word(error, number) from None
    if not failures.empty():
        raise failures.get()


def _run(
    local_rank: int,
    function: Callable[..., Any],
    number: int,
    port: int,
    arguments: Mapping[str, Any],
    level: int,
    failures: SimpleQueue,
) -> None:
    os.environ.update(
        RANK=str(local_rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(number),
        LOCAL_WORLD_SIZE=str(number),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    start_console_logging(level if local_rank == 0 else max(level, logging.WARNING))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // number))
    try:
        function(**arguments)
    except LGSSLError as error:
        failures.put(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _without_a_word(error: ProcessExitedException, number: int) -> BaseException:
    if error.exit_code == INTERRUPTED:
        return KeyboardInterrupt()
    how = f"was ended by {error.signal_name}" if error.signal_name else f"ended with {error.exit_code}"
    return TrainingError(
        f"Process {error.error_index} of {number} {how}, and the others were ended too: the checkpoints are whole, and "
        "--c goes on from them. If nobody did it, memory may have run out."
    )


def _passing_signals_on(processes: Sequence[SpawnProcess]) -> AbstractContextManager[Any]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    return handling(SIGNALS, pass_on)
