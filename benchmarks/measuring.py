"""Running commands as a user runs them, in turns, and reading their time and memory; for the benchmarks beside it.

Memory is the highest sum of the resident sets of a command and all its processes, read twenty times a second; what
processes share counts in each, for all commands alike.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HEADER = "form | seconds | times faster (range) | memory [MB] | memory ratio"


@dataclass
class Form:
    """One way to do something, with what was measured in each round."""

    name: str
    output: Path
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def row(self, reference: Form) -> str:
        """Return the cells of `HEADER`: ratios to the reference's, round by round, as median and range."""
        faster = [theirs / own for theirs, own in zip(reference.seconds, self.seconds, strict=True)]
        spread = f"{statistics.median(faster):.2f} ({min(faster):.2f} to {max(faster):.2f})"
        memory, reference_memory = max(self.memory), max(reference.memory)
        seconds = f"{statistics.median(self.seconds):.1f}"
        return f"{self.name} | {seconds} | {spread} | {memory / 2**20:.0f} | {memory / reference_memory:.2f}"


def in_turns(forms: Sequence[Form], rounds: int, run: Callable[[Form], None]) -> None:
    """Run every form once per round, forwards in one round, backwards in the next."""
    for turn in range(rounds):
        for form in forms[:: 1 if turn % 2 == 0 else -1]:
            run(form)
            said = f"{form.seconds[-1]:.1f} s, {form.memory[-1] / 2**20:.0f} MB"
            print(f"round {turn + 1}: {form.name} {said}", file=sys.stderr)


def measure(form: Form, command: Sequence[str], variables: Mapping[str, str]) -> None:
    """Run a command to its end and note seconds and memory.

    Raises:
        SystemExit: the command failed.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(list(command), env={**os.environ, **variables}, stdout=log, stderr=log)
        peak = [0]
        watch = threading.Thread(target=_watch, args=(process, peak))
        watch.start()
        status = process.wait()
        form.seconds.append(time.perf_counter() - start)
        watch.join()
        form.memory.append(peak[0])
        if status:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{log.read().decode()[-3000:]}")


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_resident(pid) for pid in _family(process.pid)))
        time.sleep(0.05)


def _family(root: int) -> set[int]:
    """Return the process and all that descend from it."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0
