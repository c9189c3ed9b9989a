"""What FixMatchTrainer does in a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional


def probabilities(trainer, image):
    with torch.no_grad():
        return torch.softmax(trainer.network(image)[0], dim=1)


def test_no_voxel_is_confident_above_a_threshold_of_one(with_settings, next_batches, values_of):
    trainer = with_settings("FixMatchTrainer", threshold=1.01)
    assert values_of(trainer, next_batches(trainer))["pseudo"] == 0


def test_confident_voxels_are_labels_and_the_mean_is_over_all_voxels(with_settings, next_batches, values_of):
    trainer = with_settings("FixMatchTrainer", threshold=0.5, cutmix=False)
    labeled, unlabeled = next_batches(trainer)
    weak, strong = probabilities(trainer, unlabeled.weak), probabilities(trainer, unlabeled.strong)
    sure = weak.amax(dim=1) >= 0.5
    assert 0 < sure.float().mean() < 1
    losses = functional.nll_loss(torch.log(strong), weak.argmax(dim=1), reduction="none")
    expected = float((losses * sure).sum() / losses.numel())
    assert values_of(trainer, (labeled, unlabeled))["pseudo"] == pytest.approx(expected, rel=1e-4)


def test_on_equal_views_it_is_the_cross_entropy_against_the_own_prediction(with_settings, next_batches, values_of):
    trainer = with_settings("FixMatchTrainer", threshold=0, cutmix=False)
    labeled, unlabeled = next_batches(trainer)
    p = probabilities(trainer, unlabeled.weak)
    one_view = dataclasses.replace(unlabeled, strong=unlabeled.weak)
    expected = float(-torch.log(p.amax(dim=1)).mean())
    assert values_of(trainer, (labeled, one_view))["pseudo"] == pytest.approx(expected, rel=1e-4)


def test_a_box_as_large_as_the_patch_swaps_the_patches(with_settings, next_batches, values_of):
    swapping = with_settings("FixMatchTrainer", threshold=0, smallest_box=1, largest_box=1)
    plain = with_settings("FixMatchTrainer", threshold=0, cutmix=False)
    labeled, unlabeled = next_batches(swapping)
    found, expected = (values_of(trainer, (labeled, unlabeled))["pseudo"] for trainer in (swapping, plain))
    assert found == pytest.approx(expected, rel=1e-4)  # the same two patches in the other order
    # With the second patch twice, nothing of the first is left in the first row.
    doubled = {name: getattr(unlabeled, name)[[1, 1]] for name in ("weak", "strong")}
    first_replaced = {name: getattr(unlabeled, name).clone() for name in ("weak", "strong")}
    captured = []
    swapping.network.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    values_of(swapping, (labeled, dataclasses.replace(unlabeled, **first_replaced)))
    assert torch.equal(captured[-1][0], doubled["strong"][0])


def test_a_pasted_box_takes_image_and_label_along(with_settings, next_batches, values_of):
    trainer = with_settings("FixMatchTrainer", threshold=0, smallest_box=0.2, largest_box=0.2)
    labeled, unlabeled = next_batches(trainer)
    captured = []
    trainer.network.register_forward_pre_hook(lambda module, inputs: captured.append(inputs[0]))
    value = values_of(trainer, (labeled, unlabeled))["pseudo"]
    mixed = captured[-1]
    pasted = mixed != unlabeled.strong
    assert torch.equal(mixed[pasted], unlabeled.strong.roll(1, dims=0)[pasted])
    assert 0.1 < pasted.float().mean() < 0.3
    label = probabilities(trainer, unlabeled.weak).argmax(dim=1)
    box = pasted[:, 0]
    label = torch.where(box, label.roll(1, dims=0), label)
    losses = functional.nll_loss(torch.log(probabilities(trainer, mixed)), label)
    assert value == pytest.approx(float(losses), rel=1e-3)


def test_no_gradient_flows_through_the_weak_view(with_settings, next_batches, terms_of):
    trainer = with_settings("FixMatchTrainer", threshold=0)
    labeled, unlabeled = next_batches(trainer)
    views = {name: getattr(unlabeled, name).clone().requires_grad_() for name in ("weak", "strong")}
    terms_of(trainer, (labeled, dataclasses.replace(unlabeled, **views)))["pseudo"].value.backward()
    assert views["weak"].grad is None
    assert views["strong"].grad.abs().max() > 0


def test_there_is_no_ramp_unless_asked_for(with_settings, next_batches, terms_of):
    for fraction, expected in ((0, 0.7), (1, 0.7 * math.exp(-5))):
        trainer = with_settings("FixMatchTrainer", pseudo_weight=0.7, ramp_fraction=fraction)
        assert terms_of(trainer, next_batches(trainer))["pseudo"].weight == pytest.approx(expected)


def test_regions_are_confident_on_either_side(started, next_batches, values_of):
    settings = {"seed": 0, "hyperparameters": {"threshold": 0.55, "cutmix": False}}
    trainer = started("FixMatchTrainer", variant="regions", training=settings)
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        weak = torch.sigmoid(trainer.network(unlabeled.weak)[0])
        strong = trainer.network(unlabeled.strong)[0]
    sure = torch.maximum(weak, 1 - weak) >= 0.55
    assert sure.any()
    losses = functional.binary_cross_entropy_with_logits(strong, (weak > 0.5).float(), reduction="none")
    expected = float((losses * sure).mean())
    assert values_of(trainer, (labeled, unlabeled))["pseudo"] == pytest.approx(expected, rel=1e-4)
