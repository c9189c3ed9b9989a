"""Running one function over many cases, in worker processes or in this one, without losing an error or hanging."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lgssl_nnunet.errors import LGSSLError
from lgssl_nnunet.workers import WorkerDiedError, WorkerPool

logger = logging.getLogger(__name__)

DIED_ALONE = (
    "its worker process was killed twice, the second time with no other beside it, most likely because memory ran out; "
    "it needs a machine with more memory, or a smaller image"
)


@dataclass(frozen=True)
class CaseFailure:
    """What a case's function raised.

    Attributes:
        reason: message of the exception on one line, with its type unless it is ours.
        details: the traceback.
    """

    reason: str
    details: str


def run_cases(
    function: Callable[..., Any],
    tasks: Mapping[str, tuple],
    *,
    num_processes: int,
    description: str,
    progress: bool = True,
    quiet: bool = True,
) -> Iterator[tuple[str, Any]]:
    """Call `function(*tasks[case])` for every case and yield the results as they are finished.

    A case whose worker process dies (killed by the system, mostly for lack of memory) is named in the log and tried
    once more at the end, alone, when no other takes memory.

    Args:
        function: a module-level function (worker processes import it).
        tasks: arguments by case identifier.
        num_processes: worker processes; 0 runs everything in this process.
        description: label of the progress bar.
        progress: show a progress bar.
        quiet: swallow what the function prints.

    Yields:
        Case identifier and result; the result is a `CaseFailure` where the function raised or its process died twice.

    Raises:
        WorkerStartError: worker processes cannot be started.
    """
    bar = tqdm(total=len(tasks), desc=description, disable=not progress or not tasks, unit="case")
    source = _run_here if num_processes <= 0 or not tasks else _run_in_workers
    with bar:
        for case, result in source(function, tasks, num_processes, quiet):
            bar.update()
            yield case, result


def _run_here(
    function: Callable[..., Any], tasks: Mapping[str, tuple], num_processes: int, quiet: bool
) -> Iterator[tuple[str, Any]]:
    for case, arguments in tasks.items():
        yield case, _guarded(function, arguments, quiet)


def _run_in_workers(
    function: Callable[..., Any], tasks: Mapping[str, tuple], num_processes: int, quiet: bool
) -> Iterator[tuple[str, Any]]:
    pool = WorkerPool(min(num_processes, len(tasks)))
    died = []
    try:
        futures = {pool.submit(_guarded, function, arguments, quiet): case for case, arguments in tasks.items()}
        for future in as_completed(list(futures)):
            case = futures.pop(future)
            try:
                result = future.result()
            except WorkerDiedError as error:
                logger.warning("%s: %s; it is tried once more, alone, after the others.", case, error)
                died.append(case)
                continue
            yield case, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for case in died:
        yield case, _run_alone(function, tasks[case], quiet)


def _run_alone(function: Callable[..., Any], arguments: tuple, quiet: bool) -> Any:
    try:
        with WorkerPool(1) as pool:
            return pool.submit(_guarded, function, arguments, quiet).result()
    except WorkerDiedError:
        return CaseFailure(DIED_ALONE, "")


def _guarded(function: Callable[..., Any], arguments: tuple, quiet: bool) -> Any:
    silence = contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext()
    try:
        with silence:
            return function(*arguments)
    except Exception as error:
        named = str(error) if isinstance(error, LGSSLError) else f"{type(error).__name__}: {error}"
        reason = " ".join(named.split())
        return CaseFailure(reason, traceback.format_exc())
