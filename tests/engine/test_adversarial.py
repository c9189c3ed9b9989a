from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lgssl_nnunet.engine.adversarial import Adversary
from lgssl_nnunet.engine.non_finite import NonFiniteError


@pytest.fixture
def critics() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(3, 1) for _ in range(2))


def loss_of(critics: nn.ModuleList, scale: float = 1.0) -> torch.Tensor:
    return sum(critic(torch.ones(2, 3)).sum() for critic in critics) * scale


def snapshot(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_outside_an_update_no_gradient_reaches_a_critic(critics):
    Adversary(critics, 1e-4, 0.01)
    image = torch.ones(2, 3, requires_grad=True)
    critics[0](image).sum().backward()
    assert image.grad.abs().max() > 0
    assert all(p.grad is None for p in critics.parameters())


def test_an_update_trains_every_critic_more_than_weight_decay_explains(critics):
    adversary, before = Adversary(critics, 1e-2, 0.01), snapshot(critics)
    value = adversary.update(lambda: loss_of(critics))
    assert value == pytest.approx(float(sum(2 * parameter.sum() for parameter in before)))
    for old, new in zip(before, critics.parameters(), strict=True):
        # The first step of AdamW is the learning rate in the direction of the gradient.
        torch.testing.assert_close(new.detach(), old * (1 - 1e-4) - 1e-2)


def test_what_an_update_leaves_behind_is_frozen_again(critics):
    adversary = Adversary(critics, 1e-2, 0.01)
    adversary.update(lambda: loss_of(critics))
    with pytest.raises(ZeroDivisionError):
        adversary.update(lambda: 1 / 0)
    assert not any(p.requires_grad for p in critics.parameters())


def test_each_critic_is_clipped_by_itself(critics):
    adversary = Adversary(critics, 0.0, 0.0)
    adversary.update(lambda: critics[0](torch.full((1, 3), 1e6)).sum() + critics[1](torch.ones(1, 3)).sum() * 1e-3)
    norms = [torch.cat([p.grad.flatten() for p in critic.parameters()]).norm() for critic in critics]
    assert norms == pytest.approx([12.0, 2e-3], rel=1e-3)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_step(critics, scale):
    adversary, before = Adversary(critics, 1e-2, 0.01), snapshot(critics)
    with pytest.raises(NonFiniteError, match="critics' loss became"):
        adversary.update(lambda: loss_of(critics, scale))
    assert all(torch.equal(a, b) for a, b in zip(before, critics.parameters(), strict=True))


def test_a_resumed_optimizer_goes_on_as_the_first(critics, same):
    adversary = Adversary(critics, 1e-2, 0.01)
    adversary.update(lambda: loss_of(critics))
    other = nn.ModuleList(nn.Linear(3, 1) for _ in range(2))
    other.load_state_dict(critics.state_dict())
    resumed = Adversary(other, 1e-2, 0.01)
    resumed.load_state_dict(copy.deepcopy(adversary.state_dict()))
    for module, owner in ((critics, adversary), (other, resumed)):
        owner.update(lambda module=module: loss_of(module, 0.5))
    assert same(critics.state_dict(), other.state_dict())
