"""What CPSTrainer does in a step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from lgssl_nnunet.engine.clipping import clip_gradients


@pytest.fixture
def trainer(with_settings):
    return with_settings("CPSTrainer")


def test_the_networks_start_from_different_weights(trainer):
    weights = [p for net in (trainer.network, trainer.second) for p in net.parameters() if p.ndim > 1]
    half = len(weights) // 2
    assert not any(torch.equal(a, b) for a, b in zip(weights[:half], weights[half:], strict=True))


def test_each_network_learns_the_hard_labels_of_the_other(trainer, next_batches, values_of):
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        first, second = (net(unlabeled.strong)[0] for net in (trainer.network, trainer.second))
    values = values_of(trainer, (labeled, unlabeled))
    assert values["pseudo"] == pytest.approx(float(functional.cross_entropy(first, second.argmax(1))), rel=1e-4)
    assert values["pseudo second"] == pytest.approx(float(functional.cross_entropy(second, first.argmax(1))), rel=1e-4)


def test_equal_networks_sharpen_themselves(trainer, next_batches, values_of):
    trainer.second.load_state_dict(trainer.network.state_dict())
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        logits = trainer.network(unlabeled.strong)[0]
    values = values_of(trainer, (labeled, unlabeled))
    assert values["pseudo"] == values["pseudo second"]
    assert values["pseudo"] == pytest.approx(float(functional.cross_entropy(logits, logits.argmax(1))), rel=1e-4)


def test_each_term_reaches_its_own_network_only(trainer, next_batches, terms_of, reached):
    terms = terms_of(trainer, next_batches(trainer))
    for name, term in terms.items():
        names = reached(term.value, first=trainer.network, second=trainer.second)
        assert {key.split(".")[0] for key in names} == {"second" if name.endswith("second") else "first"}


def test_regions_are_thresholded_and_learnt_by_binary_cross_entropy(started, next_batches, values_of):
    trainer = started("CPSTrainer", variant="regions")
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        first, second = (net(unlabeled.strong)[0] for net in (trainer.network, trainer.second))
    expected = functional.binary_cross_entropy_with_logits(first, (second > 0).float())
    assert values_of(trainer, (labeled, unlabeled))["pseudo"] == pytest.approx(float(expected), rel=1e-4)


def test_a_step_changes_both_networks_and_the_checkpoint_holds_them(trainer, same, tmp_path):
    before = [p.detach().clone() for p in trainer.second.parameters()]
    trainer.train_step(next(trainer.dataloader_train))
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.second.parameters(), strict=True))
    trainer.save_checkpoint(tmp_path / "checkpoint.pth")
    stored = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert same(stored["network_weights"], trainer.network.state_dict())
    assert same(stored["lgssl"]["second_network"], trainer.second.state_dict())


def test_the_weight_follows_the_ramp(with_settings, next_batches, terms_of):
    trainer = with_settings("CPSTrainer", pseudo_weight=0.4, ramp_fraction=0.5)
    batches = next_batches(trainer)
    weights = []
    for iteration in (0, 2):
        trainer.iteration = iteration
        terms = terms_of(trainer, batches)
        weights.append([terms[name].weight for name in ("pseudo", "pseudo second")])
    assert weights == [pytest.approx([0.4 * math.exp(-5)] * 2), [0.4, 0.4]]


def test_the_gradient_of_one_network_is_clipped_without_the_other(trainer):
    (first, *_), (second, *_) = trainer.network.parameters(), trainer.second.parameters()
    trainer.optimizer.zero_grad(set_to_none=True)
    first.grad, second.grad = torch.full_like(first, 1e6), torch.full_like(second, 1e-3)
    clip_gradients(trainer.optimizer)
    assert first.grad.norm() == pytest.approx(12.0, rel=1e-3)
    torch.testing.assert_close(second.grad, torch.full_like(second, 1e-3))
