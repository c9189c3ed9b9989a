"""Ramps, decay of the teacher and learning rates have their published values."""

from __future__ import annotations

import itertools

import pytest
import torch

from lgssl_nnunet.engine.schedules import CosineSchedule, ema_decay, sigmoid_rampup


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.0067), (25, 0.0601), (50, 0.2865), (75, 0.7316), (100, 1.0), (101, 1.0), (10_000, 1.0)]
)
def test_the_sigmoid_ramp_up_has_its_published_values(step, value):
    assert sigmoid_rampup(step, 100) == pytest.approx(value, abs=5e-5)


def test_the_sigmoid_ramp_up_rises_all_the_way():
    values = [sigmoid_rampup(step, 200) for step in range(201)]
    assert all(a < b for a, b in itertools.pairwise(values))


def test_a_ramp_of_length_zero_is_no_ramp():
    assert sigmoid_rampup(0, 0) == 1.0


def test_a_ramp_depends_on_the_share_of_its_length_only():
    assert sigmoid_rampup(3, 12) == sigmoid_rampup(30, 120) == sigmoid_rampup(0.5, 2)


@pytest.mark.parametrize(("step", "length"), [(-1, 10), (1, -10)])
def test_a_ramp_refuses_negative_numbers(step, length):
    with pytest.raises(ValueError, match="must not be negative"):
        sigmoid_rampup(step, length)


def test_the_teachers_decay_starts_at_zero_and_ends_at_its_maximum():
    assert [ema_decay(update, 0.99) for update in (0, 1, 2, 3)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])
    assert ema_decay(98, 0.99) == pytest.approx(1 - 1 / 99)
    assert ema_decay(99, 0.99) == ema_decay(100_000, 0.99) == 0.99


@pytest.mark.parametrize("maximum", [-0.1, 1.0, 1.5])
def test_the_teachers_decay_refuses_a_maximum_outside_its_range(maximum):
    with pytest.raises(ValueError, match="maximum must lie in"):
        ema_decay(1, maximum)


@pytest.fixture
def optimizer():
    return torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))]}, {"params": [torch.nn.Parameter(torch.zeros(1))]}], lr=7.0
    )


def test_the_cosine_schedule_goes_from_the_initial_rate_to_zero(optimizer):
    schedule = CosineSchedule(optimizer, 0.01, 20)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01]
    rates = []
    for epoch in (0, 5, 10, 15, 20, 25):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[1]["lr"])
    assert rates == pytest.approx([0.01, 0.0085355, 0.005, 0.0014645, 0, 0], abs=1e-7)


def test_the_cosine_schedule_moves_within_an_epoch(optimizer):
    schedule = CosineSchedule(optimizer, 1.0, 2)
    schedule.step(0.5)
    first = optimizer.param_groups[0]["lr"]
    schedule.step(0.6)
    assert 1.0 > first > optimizer.param_groups[0]["lr"] > 0.5
