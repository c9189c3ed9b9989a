"""Worker processes that work on one call each, so that one that dies is known by its call and takes no other along."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lgssl_nnunet.errors import LGSSLError


class WorkerDiedError(LGSSLError):
    """The process that worked on a call ended without an answer: the system killed it, or a library crashed."""

    exit_code = 1


class WorkerStartError(LGSSLError):
    """No worker process can be started."""

    exit_code = 1


class WorkerPool(Executor):
    """Executor whose calls fail one by one.

    When a process of a `ProcessPoolExecutor` is killed, all calls that are not finished fail, and nobody knows whose
    process it was. Here each thread has such a pool of one process: only the call that it worked on raises
    `WorkerDiedError`, and the next call gets a new process.

    Args:
        workers: number of processes; each starts with its first call.
    """

    def __init__(self, workers: int):
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="worker_pool")
        self._own = threading.local()
        self._processes: set[ProcessPoolExecutor] = set()
        self._changing = threading.Lock()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future:
        """Return the future of a call; functions and arguments are those that processes can pickle."""
        return self._threads.submit(self._call, function, arguments, options)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, once they have finished what they work on."""
        self._threads.shutdown(wait=wait, cancel_futures=cancel_futures)
        with self._changing:
            for process in self._processes:
                process.shutdown(wait=wait, cancel_futures=cancel_futures)

    def _call(self, function: Callable[..., Any], arguments: tuple, options: dict[str, Any]) -> Any:
        process = getattr(self._own, "process", None) or self._start()
        try:
            return process.submit(function, *arguments, **options).result()
        except BrokenProcessPool:
            self._own.process = None
            with self._changing:
                self._processes.discard(process)
            raise WorkerDiedError("its worker process was killed, most likely because memory ran out") from None

    def _start(self) -> ProcessPoolExecutor:
        """Start a process and wait until it answers, so that one that cannot start is not taken for one that died."""
        context = multiprocessing.get_context("spawn")
        process = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)
        try:
            process.submit(os.getpid).result()
        except BrokenProcessPool:
            raise WorkerStartError(
                "No worker process can be started: in a script, call from under `if __name__ == '__main__':`; if "
                "memory is short, use no worker processes (0)."
            ) from None
        self._own.process = process
        with self._changing:
            self._processes.add(process)
        return process


def end_with_parent() -> None:
    """End this process when its parent dies: it would wait for work for ever, and hold its memory."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
