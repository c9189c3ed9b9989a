"""Steps that cannot be done: counted, and the end of the run when five follow each other."""

from __future__ import annotations

import pytest

from lgssl_nnunet.engine.non_finite import NonFiniteError, NonFiniteGuard
from lgssl_nnunet.errors import TrainingError

BROKEN = NonFiniteError("the loss term 'agreement'", float("nan"))


def test_four_in_a_row_are_named_and_counted(caplog):
    guard = NonFiniteGuard()
    for iteration in range(4):
        guard.skip(BROKEN, iteration)
    assert caplog.messages[-1] == "Iteration 3 is skipped: the loss term 'agreement' became nan (4 skipped so far)."
    assert (guard.skipped, guard.in_a_row) == (4, 4)


def test_the_fifth_ends_the_run_with_exit_code_one():
    guard = NonFiniteGuard()
    for iteration in range(4):
        guard.skip(BROKEN, iteration)
    with pytest.raises(
        TrainingError, match=r"5 steps in a row .* iteration 4, because the loss term 'agreement'"
    ) as end:
        guard.skip(BROKEN, 4)
    assert end.value.exit_code == 1


def test_a_step_that_is_done_begins_a_new_row_but_no_new_count():
    guard = NonFiniteGuard()
    for iteration in range(12):
        guard.skip(BROKEN, iteration)
        if iteration % 4 == 3:
            guard.done()
    assert (guard.skipped, guard.in_a_row) == (12, 0)


def test_the_counts_survive_a_checkpoint():
    guard, resumed = NonFiniteGuard(), NonFiniteGuard()
    guard.skip(BROKEN, 0)
    resumed.load_state_dict(guard.state_dict())
    assert (resumed.skipped, resumed.in_a_row) == (1, 1)


def test_what_a_gradient_scaler_leaves_out_above_scale_one_is_neither_counted_nor_the_end(caplog):
    guard = NonFiniteGuard()
    guard.skip(BROKEN, 0)
    with caplog.at_level("INFO", "lgssl_nnunet"):
        for iteration in range(1, 17):
            guard.skip(NonFiniteError("the gradient", float("inf"), scale=2.0 ** (17 - iteration)), iteration)
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    assert caplog.messages[-1] == "Iteration 16 is left out: gradients overflow at scale 2."
    guard.skip(NonFiniteError("the gradient", float("inf"), scale=1.0), 17)
    assert (guard.skipped, guard.in_a_row) == (2, 2)
