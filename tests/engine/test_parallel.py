from __future__ import annotations

from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest

from lgssl_nnunet import parallel
from lgssl_nnunet.errors import LGSSLError
from lgssl_nnunet.parallel import CaseFailure, run_cases


def half(number: int) -> int:
    print("noise")
    if number % 2:
        raise ValueError("odd\nnumber")
    return number // 2


def test_results_and_failures_come_with_their_case(capsys):
    results = dict(run_cases(half, {"a": (4,), "b": (3,)}, num_processes=0, description="x", progress=False))
    assert results["a"] == 2
    assert isinstance(results["b"], CaseFailure)
    assert results["b"].reason == "ValueError: odd number"
    assert "half" in results["b"].details
    assert capsys.readouterr().out == ""


def test_what_a_function_prints_is_shown_on_request(capsys):
    dict(run_cases(half, {"a": (4,)}, num_processes=0, description="x", progress=False, quiet=False))
    assert capsys.readouterr().out == "noise\n"


class DyingPool:
    """Stands for a pool whose worker was killed by the system."""

    def __init__(self, *args, **kwargs) -> None:
        self.was_shut_down = False

    def submit(self, *args) -> Future:
        future: Future = Future()
        future.set_exception(BrokenProcessPool("killed"))
        return future

    def shutdown(self, **kwargs) -> None:
        self.was_shut_down = True


def test_a_dead_worker_is_an_error_and_not_a_hang(monkeypatch):
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", DyingPool)
    with pytest.raises(LGSSLError, match="worker process died with 2 cases unfinished"):
        dict(run_cases(half, {"a": (4,), "b": (2,)}, num_processes=2, description="x", progress=False))
