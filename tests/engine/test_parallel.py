from __future__ import annotations

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
