"""Worker processes that are killed while they work: detected, named, tried once more alone, and nothing hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.workers import WorkerDiedError, WorkerPool


def work(case: str, folder: Path, deadly: str, deaths: int) -> str:
    """Note who worked on what; the process of the deadly case is killed the first few times."""
    with (folder / case).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    if case == deadly and len((folder / case).read_text().splitlines()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "wrong":
        raise ValueError("no such voxel")
    return case.upper()


def run(folder: Path, cases: str, deadly: str, deaths: int) -> dict:
    tasks = {case: (case, folder, deadly, deaths) for case in cases.split()}
    return dict(run_cases(work, tasks, num_processes=2, description="x", progress=False))


def test_a_killed_worker_costs_its_own_case_one_repetition_and_the_others_none(tmp_path, caplog):
    results = run(tmp_path, "a b c d", deadly="b", deaths=1)
    assert results == {case: case.upper() for case in "abcd"}
    assert list(results)[-1] == "b"
    assert {file.name: len(file.read_text().splitlines()) for file in tmp_path.iterdir()} == dict(a=1, b=2, c=1, d=1)
    (message,) = caplog.messages
    assert message.startswith("b: its worker process was killed")


def test_a_case_that_kills_its_worker_twice_is_named_and_the_others_are_finished(tmp_path):
    results = run(tmp_path, "a b wrong c", deadly="a", deaths=9)
    assert {case: result for case, result in results.items() if not isinstance(result, CaseFailure)} == dict(
        b="B", c="C"
    )
    assert "killed twice, the second time with no other beside it" in results["a"].reason
    assert results["wrong"].reason == "ValueError: no such voxel"
    assert len((tmp_path / "a").read_text().splitlines()) == 2


def test_the_pool_goes_on_after_a_death_and_tells_errors_from_deaths(tmp_path):
    with WorkerPool(1) as pool:
        first, second, third = (pool.submit(work, case, tmp_path, "a", 1) for case in ("a", "wrong", "b"))
        with pytest.raises(WorkerDiedError, match="was killed"):
            first.result(timeout=60)
        with pytest.raises(ValueError, match="no such voxel"):
            second.result(timeout=60)
        assert third.result(timeout=60) == "B"


SCRIPT = """
    import sys, time
    from lgssl_nnunet.parallel import run_cases
    {guard}
    results = run_cases(time.sleep, {{"a": (0,), "b": ({seconds},)}}, num_processes=2, description="x", progress=False)
    print(dict(results))
"""


def script(tmp_path: Path, **content) -> Path:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT).format(**content))
    return file


def test_a_script_without_the_usual_guard_is_told_so(tmp_path):
    file = script(tmp_path, guard="", seconds=0)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "No worker process can be started: in a script, call from under `if __name__" in done.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the processes in /proc")
def test_workers_end_when_the_command_is_killed(tmp_path, wait_for, is_running):
    file = script(tmp_path, guard="if __name__ != '__main__': sys.exit()", seconds=60)
    command = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.DEVNULL)
    wait_for(lambda: len(workers_of(command.pid)) >= 2)
    workers = workers_of(command.pid)
    time.sleep(1)  # until they watch their parent
    command.kill()
    command.wait()
    wait_for(lambda: not any(is_running(worker) for worker in workers))


def workers_of(parent: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
            is_worker = "spawn_main" in (file.parent / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == parent and is_worker:
            found.append(int(file.parent.name))
    return found
