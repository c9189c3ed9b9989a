"""What must hold whatever a file contains: an end in time, a clean error or a result, nothing run or half written."""

from __future__ import annotations

import faulthandler
import gzip
import json
import os
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from lgssl_nnunet.errors import LGSSLError

resource = pytest.importorskip("resource", reason="memory is limited as on Linux")

EXAMPLES = {
    "images": 70,
    "segmentations": 55,
    "images to predict": 25,
    "dataset.json": 65,
    "prompt files": 30,
    "lists of cases": 30,
    "dataset.json beside predictions": 35,
    "plans and dataset.json of a model": 50,
    "plans to train": 25,
    "checkpoints": 70,
    "bundles": 30,
    "embedding banks": 60,
}
"""How many mutated files of each kind are tried."""

MULTIPLE = float(os.environ.get("LGSSL_FUZZ_EXAMPLES", "1"))
"""How many times as many."""

CANARY = "canary"
"""Name of the file that hostile input would make."""

_SECONDS, _SECONDS_WITHOUT_PYTHON = 60, 240
_BYTES_MORE = 3 << 30
_PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"}
_HERE = str(Path(__file__).parent)
_KNOWN_CODE = tuple(
    os.path.realpath(path)
    for path in (*dict.fromkeys(sysconfig.get_paths().values()), *sys.path, Path(__file__).parents[2])
    if path
)
_seen: list[str] | None = None


@dataclass
class Tally:
    """What became of the examples of one kind."""

    refused: int = 0
    read: int = 0


def fuzz(kind: str, content: SearchStrategy, try_one: Callable[[Any, Tally], None]) -> None:
    """Call `try_one` with the examples of a kind, the same ones in every run; some must be refused and some read."""
    tally, number = Tally(), round(EXAMPLES[kind] * MULTIPLE)

    @settings(
        max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(content)
    def try_all(example: Any) -> None:
        try_one(example, tally)

    try_all()
    print(f"{kind}: {tally.refused} refused, {tally.read} read")
    assert tally.refused + tally.read >= number
    assert tally.refused >= number / 4
    assert tally.read >= number / 40


def attempt(
    action: Callable[[], Any], folder: Path, tally: Tally, may_write: Callable[[Path], bool] = lambda file: False
) -> Any:
    """Call `action` and return its result, None if it refuses in a sentence; anything else fails.

    Args:
        action: reads what was mutated.
        folder: below it lies everything that it may touch.
        tally: where the outcome is counted.
        may_write: which files may be new or changed; they must be whole.
    """
    before, result = files_below(folder), None
    with limits(), watched() as seen:
        try:
            result = action()
        except LGSSLError as error:
            sentence = str(error)
        else:
            sentence = None
    if sentence is None:
        tally.read += 1
    else:
        tally.refused += 1
        assert len(sentence) > 20, f"no sentence: {sentence}"
    assert seen == [], f"something was run: {seen}"
    assert not (folder / CANARY).exists()
    after = files_below(folder)
    changed = {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}
    assert {file for file in changed if not may_write(file)} == set()
    for file in changed & after.keys():
        require_whole(file)
    return result


def files_below(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return size and time of every file below a folder, locks aside."""
    files = [Path(place, name) for place, _, names in os.walk(folder) for name in names if not name.endswith(".lock")]
    return {file: (file.lstat().st_size, file.lstat().st_mtime_ns) for file in files}


def require_whole(file: Path) -> None:
    """Fail if a file that was written is not whole."""
    assert ".tmp" not in file.name
    assert ".partial" not in str(file)
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".gz":
        assert gzip.decompress(file.read_bytes())


@contextmanager
def limits() -> Iterator[None]:
    """Fail after a minute, end the process after four if not even Python is reached, and allow 3 GiB more memory."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not finished after {_SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(_SECONDS_WITHOUT_PYTHON, exit=True)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _BYTES_MORE, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Note processes that are started, and code that is run and belongs to no installed module."""
    global _seen
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


def _hook(event: str, arguments: Sequence[Any]) -> None:
    if _seen is None:
        return
    if event in _PROCESSES:
        _seen.append(f"{event} {arguments[:1]}")
    elif event == "exec":
        place = getattr(arguments[0], "co_filename", "")
        if not place.startswith(("<frozen", *_KNOWN_CODE)) and not _is_importing(sys._getframe(1)):
            _seen.append(f"{event} {place}")


def _is_importing(frame: FrameType | None) -> bool:
    """Whether an installed module is being imported: some write functions as text and run it."""
    while frame is not None and not frame.f_code.co_filename.startswith(_HERE):
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(_KNOWN_CODE):
            return True
        frame = frame.f_back
    return False


sys.addaudithook(_hook)
