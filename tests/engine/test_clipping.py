"""Clipping of each parameter group by itself, also of one that no term of the loss reaches."""

from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.engine.clipping import GRADIENT_NORM_LIMIT, clip_gradients


def optimizer_of(*gradients: list[float] | None, device: str = "cpu") -> torch.optim.Optimizer:
    """An optimiser with a group for each gradient, None for a group that has none."""
    parameters = [torch.nn.Parameter(torch.zeros(2, device=device)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient, device=device)
    return torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=1)


def test_each_group_is_clipped_by_itself_and_the_largest_norm_returned():
    optimizer = optimizer_of([3.0, 4.0], [30.0, 40.0])
    assert clip_gradients(optimizer) == 50
    small, large = (group["params"][0].grad for group in optimizer.param_groups)
    assert small.tolist() == [3, 4]
    assert large.norm().item() == pytest.approx(GRADIENT_NORM_LIMIT)


def test_one_group_that_is_not_finite_is_enough():
    assert not clip_gradients(optimizer_of([3.0, 4.0], [float("nan"), 0.0])).isfinite()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_group_without_gradients_counts_as_zero(order):
    gradients = [[3.0, 4.0], None]
    assert clip_gradients(optimizer_of(*(gradients[n] for n in order))) == 5


def test_a_group_without_gradients_may_lie_on_another_device_than_the_cpu():
    # The meta device stands for a GPU: it mixes with the CPU as little.
    assert clip_gradients(optimizer_of([3.0, 4.0], None, device="meta")).device.type == "meta"
