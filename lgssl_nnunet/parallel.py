"""Running one function over many cases, in worker processes or in this one, without losing an error or hanging."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from lgssl_nnunet.errors import LGSSLError


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

    Args:
        function: a module-level function (worker processes import it).
        tasks: arguments by case identifier.
        num_processes: worker processes; 0 runs everything in this process.
        description: label of the progress bar.
        progress: show a progress bar.
        quiet: swallow what the function prints.

    Yields:
        Case identifier and result; the result is a `CaseFailure` where the function raised.

    Raises:
        LGSSLError: a worker process died (killed by the system, mostly for lack of memory).
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
    executor = ProcessPoolExecutor(min(num_processes, len(tasks)), mp_context=multiprocessing.get_context("spawn"))
    unfinished = set(tasks)
    try:
        futures = {executor.submit(_guarded, function, arguments, quiet): case for case, arguments in tasks.items()}
        for future in as_completed(list(futures)):
            case = futures.pop(future)
            result = future.result()
            unfinished.discard(case)
            yield case, result
    except BrokenProcessPool:
        raise LGSSLError(
            f"A worker process died with {len(unfinished)} cases unfinished (among them {min(unfinished)}), most "
            "likely because memory ran out; use fewer processes (-np and -npfp, 0 for none), and in a script call "
            "from under `if __name__ == '__main__':`."
        ) from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _guarded(function: Callable[..., Any], arguments: tuple, quiet: bool) -> Any:
    silence = contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext()
    try:
        with silence:
            return function(*arguments)
    except Exception as error:
        named = str(error) if isinstance(error, LGSSLError) else f"{type(error).__name__}: {error}"
        reason = " ".join(named.split())
        return CaseFailure(reason, traceback.format_exc())
