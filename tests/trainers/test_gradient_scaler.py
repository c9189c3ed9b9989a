"""Steps with the gradient scaler that a training on CUDA has; torch's own, which also works on a CPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lgssl_nnunet.errors import TrainingError


@pytest.fixture
def scaled(started) -> Callable[[float], Any]:
    """A trainer with a teacher, after a step, whose scaler begins with this scale."""

    def make(scale: float) -> Any:
        trainer = started("ExampleTeacherTrainer")
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train_step(next(trainer.dataloader_train))
        return trainer

    return make


def break_gradients(trainer: Any, value: float) -> Any:
    """Make gradients of the next steps infinite or nan; returned is what takes that back."""
    return next(iter(trainer.network.parameters())).register_hook(lambda gradient: gradient * value)


def state_of(trainer: Any) -> Any:
    optimizer = trainer.optimizer.state_dict()["state"]
    return pickle.loads(pickle.dumps([trainer.network.state_dict(), trainer.teacher.state_dict(), optimizer]))


def test_a_scaled_step_is_the_step_without_a_scaler(scaled, started, same):
    trainer, plain = scaled(1024), started("ExampleTeacherTrainer")
    plain.train_step(next(plain.dataloader_train))
    assert same(state_of(trainer), state_of(plain))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_lowers_the_scale_and_does_nothing_else(value, scaled, same, caplog):
    trainer, followed = scaled(1024), []
    trainer.extra_steps = lambda *batches: followed.append(batches)
    trainer.non_finite.in_a_row = 3
    before, hook = state_of(trainer), break_gradients(trainer, value)
    with caplog.at_level("INFO", "lgssl_nnunet"):
        assert set(trainer.train_step(next(trainer.dataloader_train))) == {"loss"}
    assert same(state_of(trainer), before)
    assert not followed
    assert (trainer.non_finite.skipped, trainer.non_finite.in_a_row) == (0, 3)
    assert trainer.grad_scaler.get_scale() == 512
    assert "Iteration 1 is left out" in caplog.text
    hook.remove()
    assert set(trainer.train_step(next(trainer.dataloader_train))) > {"loss"}
    assert not same(state_of(trainer), before)
    assert len(followed) == 1
    assert trainer.non_finite.in_a_row == 0


def test_a_gradient_that_is_not_finite_at_scale_one_is_named_counted_and_ends_the_run(scaled, same, caplog):
    trainer = scaled(4)
    before = state_of(trainer)
    break_gradients(trainer, float("nan"))
    for _ in range(2 + 4):  # at the scales 4 and 2, then at 1 and below
        trainer.train_step(next(trainer.dataloader_train))
    assert (trainer.non_finite.skipped, trainer.non_finite.in_a_row) == (4, 4)
    assert "Iteration 3 is skipped: the norm of the gradient, although the loss is finite, became nan" in caplog.text
    with pytest.raises(TrainingError, match=r"5 steps in a row .* iteration 7, because the norm of the gradient"):
        trainer.train_step(next(trainer.dataloader_train))
    assert same(state_of(trainer), before)


def test_finite_gradients_whose_norm_overflows_are_counted_since_the_scale_does_not_fall(scaled):
    trainer = scaled(4)
    break_gradients(trainer, 1e25)
    for _ in range(4):
        trainer.train_step(next(trainer.dataloader_train))
    assert trainer.grad_scaler.get_scale() == 4
    assert trainer.non_finite.in_a_row == 4
    with pytest.raises(TrainingError, match=r"5 steps in a row"):
        trainer.train_step(next(trainer.dataloader_train))
