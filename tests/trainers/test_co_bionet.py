"""What CoBioNetTrainer does in a step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from lgssl_nnunet.engine.clipping import clip_gradients
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.losses.consistency import masked_mean

ALL_VOXELS = {"critic_voxels": 0}
SUFFIXES = ("", " second")


@pytest.fixture
def trainer(with_settings):
    return with_settings("CoBioNetTrainer", **ALL_VOXELS)


def logits(trainer: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """Full-resolution logits of both networks."""
    with torch.no_grad():
        return [network(image)[0] for network in (trainer.network.first, trainer.network.second)]


def soft_cross_entropy(z: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    return -(p * z.log_softmax(1)).sum(1, keepdim=True)


def critic_weights(trainer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.critics.parameters()]


def test_the_networks_are_alike_and_start_from_different_weights(trainer):
    pairs = list(zip(trainer.network.first.parameters(), trainer.network.second.parameters(), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in pairs if a.ndim > 1)


def test_each_network_learns_the_probabilities_of_the_other(trainer, next_batches, values_of):
    labeled, unlabeled = next_batches(trainer)
    z = logits(trainer, unlabeled.strong)
    values = values_of(trainer, (labeled, unlabeled))
    for k, suffix in enumerate(SUFFIXES):
        expected = soft_cross_entropy(z[k], z[1 - k].softmax(1)).mean()
        assert values[f"difference{suffix}"] == pytest.approx(float(expected), rel=1e-4)
        network = (trainer.network.first, trainer.network.second)[k]
        supervised = trainer.loss(network(labeled.image), labeled.target)
        assert values[f"supervised{suffix}"] == pytest.approx(float(supervised.detach()), rel=1e-4)


def middle(trainer: Any, maps: list[torch.Tensor]) -> float:
    """A threshold that some voxels of either map pass."""
    return float(torch.cat([m.flatten() for m in maps]).median())


def test_the_critic_of_the_writer_selects_voxels_by_the_class_that_it_predicts(trainer, next_batches, values_of):
    labeled, unlabeled = next_batches(trainer)
    z = logits(trainer, unlabeled.strong)
    p = [zk.softmax(1) for zk in z]
    confidences = []
    for k in range(2):
        with torch.no_grad():
            confidence = torch.sigmoid(trainer.critics[k](p[k]))
        confidences.append(confidence.gather(1, p[k].argmax(1, keepdim=True)))
    threshold = middle(trainer, confidences)
    trainer.hp = dataclasses.replace(trainer.hp, mask_threshold=threshold)
    values = values_of(trainer, (labeled, unlabeled))
    for k, suffix in enumerate(SUFFIXES):
        mask, cross_entropy = (confidences[1 - k] > threshold).float(), soft_cross_entropy(z[k], p[1 - k])
        assert 0 < mask.mean() < 1
        expected = (mask * cross_entropy).sum() / mask.sum()
        assert values[f"trusted difference{suffix}"] == pytest.approx(float(expected), rel=1e-3)
        # The released code multiplies two means.
        assert abs(float(expected) - float(mask.mean() * cross_entropy.mean())) > 1e-2


def test_a_threshold_of_zero_trusts_all_and_of_one_nothing(with_settings, next_batches, values_of):
    for threshold in (0.0, 1.0):
        trainer = with_settings("CoBioNetTrainer", mask_threshold=threshold)
        values = values_of(trainer, next_batches(trainer))
        for suffix in SUFFIXES:
            expected = values[f"difference{suffix}"] if threshold == 0 else 0.0
            assert values[f"trusted difference{suffix}"] == pytest.approx(expected)


def test_the_adversarial_term_is_the_doubt_of_the_networks_own_critic(trainer, next_batches, values_of):
    labeled, unlabeled = next_batches(trainer)
    z = logits(trainer, torch.cat([labeled.image, unlabeled.strong]))
    values = values_of(trainer, (labeled, unlabeled))
    for k, suffix in enumerate(SUFFIXES):
        with torch.no_grad():
            judged = trainer.critics[k](z[k].softmax(1))
        expected = functional.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        assert values[f"adversarial{suffix}"] == pytest.approx(float(expected), rel=1e-4)


def test_every_term_reaches_its_own_network_and_no_critic(trainer, next_batches, terms_of, reached):
    for name, term in terms_of(trainer, next_batches(trainer)).items():
        names = reached(term.value, pair=trainer.network, critics=trainer.critics)
        parts = {tuple(key.split(".")[:2]) for key in names}
        assert parts == {("pair", "second" if name.endswith("second") else "first")}


def test_a_step_of_the_networks_leaves_no_gradient_in_the_critics(trainer, next_batches, terms_of):
    trainer.total(terms_of(trainer, next_batches(trainer))).backward()
    assert all(p.grad is None for p in trainer.critics.parameters())


@pytest.mark.parametrize("spatial", [False, True])
def test_a_step_trains_the_critics_more_than_weight_decay_explains(with_settings, spatial):
    trainer = with_settings("CoBioNetTrainer", spatial_critic=spatial, critic_voxels=200)
    before = critic_weights(trainer)
    trainer.train_step(next(trainer.dataloader_train))
    for old, new in zip(before, critic_weights(trainer), strict=True):
        assert (new - old).abs().max() > 10 * 1e-4 * 0.01 * old.abs().max()


def test_critics_learn_labels_of_labelled_patches_and_predictions_of_all(trainer, next_batches, terms_of, monkeypatch):
    labeled, unlabeled = next_batches(trainer)
    terms_of(trainer, (labeled, unlabeled))
    z = logits(trainer, torch.cat([labeled.image, unlabeled.strong]))
    label = functional.one_hot(labeled.target[0][:, 0].long(), 3).movedim(-1, 1).float()
    bce, expected = functional.binary_cross_entropy_with_logits, 0.0
    with torch.no_grad():
        for k, critic in enumerate(trainer.critics):
            real, fake = critic(label), critic(z[k].softmax(1))
            expected += 0.5 * bce(real, torch.ones_like(real)) + 0.5 * bce(fake, torch.zeros_like(fake))
    found, update = [], trainer.adversary.update
    monkeypatch.setattr(trainer.adversary, "update", lambda loss: found.append(update(loss)))
    trainer.extra_steps(labeled, unlabeled)
    assert found == [pytest.approx(float(expected), rel=1e-4)]


def test_the_critics_update_changes_no_network(trainer, next_batches, terms_of, same):
    batches = next_batches(trainer)
    terms_of(trainer, batches)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer.extra_steps(*batches)
    assert same(before, dict(trainer.network.state_dict()))
    assert all(p.grad is None for p in trainer.network.parameters())


def test_regions_are_learnt_and_trusted_each_by_itself(started, next_batches, values_of):
    settings = {"training": {"seed": 0, "hyperparameters": ALL_VOXELS}}
    trainer = started("CoBioNetTrainer", variant="regions", **settings)
    labeled, unlabeled = next_batches(trainer)
    z1, z2 = logits(trainer, unlabeled.strong)
    with torch.no_grad():
        confidence = torch.sigmoid(trainer.critics[1](z2.sigmoid()))
    trainer.hp = dataclasses.replace(trainer.hp, mask_threshold=float(confidence.median()))
    values = values_of(trainer, (labeled, unlabeled))
    difference = functional.binary_cross_entropy_with_logits(z1, z2.sigmoid(), reduction="none")
    assert values["difference"] == pytest.approx(float(difference.mean()), rel=1e-4)
    expected = masked_mean(difference, confidence > trainer.hp.mask_threshold)
    assert values["trusted difference"] == pytest.approx(float(expected), rel=1e-3)


def test_voxels_to_ignore_are_no_example_for_a_critic(started, next_batches, terms_of, monkeypatch):
    trainer = started("CoBioNetTrainer", variant="ignore")
    labeled, unlabeled = next_batches(trainer)
    ignore = trainer.label_manager.ignore_label
    blind = dataclasses.replace(labeled, target=[torch.full_like(scale, ignore) for scale in labeled.target])
    found = []
    monkeypatch.setattr(trainer.adversary, "update", lambda loss: found.append(float(loss().detach())))
    for batch in (labeled, blind):
        terms_of(trainer, (batch, unlabeled))
        trainer.extra_steps(batch, unlabeled)
    with torch.no_grad():
        fakes = [functional.softplus(c(fake)).mean() for c, fake in zip(trainer.critics, trainer.fakes, strict=True)]
    assert found[1] == pytest.approx(0.5 * float(sum(fakes)), rel=1e-4)
    assert found[0] > found[1]


def test_a_spatial_critic_refuses_an_ignore_label_before_anything_is_written(build, tmp_path):
    settings = {"training": {"seed": 0, "hyperparameters": {"spatial_critic": True}}}
    with pytest.raises(UsageError, match="spatial_critic=True needs labels in every voxel"):
        build("CoBioNetTrainer", variant="ignore", results=tmp_path, **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("spatial", "kernel"), [(False, ()), (True, (3, 3, 3))])
def test_the_kernels_of_the_critics_are_an_option(with_settings, spatial, kernel):
    trainer = with_settings("CoBioNetTrainer", spatial_critic=spatial)
    assert {tuple(p.shape[2:]) for p in trainer.critics.parameters() if p.ndim > 1} == {kernel}


def test_critics_see_as_many_voxels_as_asked_for(with_settings, next_batches, terms_of):
    trainer = with_settings("CoBioNetTrainer", critic_voxels=50)
    terms_of(trainer, next_batches(trainer))
    assert [fake.shape for fake in trainer.fakes] == [(4, 3, 50)] * 2


def test_weights_follow_the_hyperparameters(with_settings, next_batches, terms_of):
    values = {"supervised_weight": 0.9, "consistency_weight": 0.5, "ramp_fraction": 0.5, "adversarial_weight": 0.2}
    trainer = with_settings("CoBioNetTrainer", **values)
    batches = next_batches(trainer)
    for trainer.iteration, ramp in ((0, math.exp(-5)), (2, 1.0)):
        terms = terms_of(trainer, batches)
        for suffix in SUFFIXES:
            weights = [terms[f"{name}{suffix}"].weight for name in ("supervised", "difference", "adversarial")]
            assert weights == pytest.approx([0.9, 0.5 * ramp, 0.2 * 0.5 * ramp])
            assert terms[f"trusted difference{suffix}"].weight == terms[f"difference{suffix}"].weight


def test_the_critics_optimizer_follows_the_hyperparameters(with_settings):
    trainer = with_settings("CoBioNetTrainer", critic_learning_rate=0.3, critic_weight_decay=0.2)
    trainer.train_step(next(trainer.dataloader_train))
    groups = trainer.adversary.optimizer.param_groups  # their learning rate is constant
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.3, 0.2)] * 2
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in trainer.critics.parameters()}


def test_the_checkpoint_holds_critics_and_their_optimizer_beside_the_prediction_network(trainer, same, tmp_path):
    trainer.train_step(next(trainer.dataloader_train))
    trainer.save_checkpoint(tmp_path / "checkpoint.pth")
    stored = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert same(stored["lgssl"]["critics"], trainer.critics.state_dict())
    assert same(stored["lgssl"]["critic_optimizer"], trainer.adversary.state_dict())
    assert stored["lgssl"]["critic_optimizer"]["state"]
    assert not any("critic" in name for name in stored["network_weights"])


def test_resuming_with_spatial_critics_ends_as_an_uninterrupted_run_to_the_bit(check_resuming):
    values = {"spatial_critic": True, "critic_voxels": 200}
    check_resuming("CoBioNetTrainer", iterations=1, training={"seed": 0, "hyperparameters": values})


def test_the_gradient_of_one_network_is_clipped_without_the_other(trainer):
    first, second = (next(net.parameters()) for net in (trainer.network.first, trainer.network.second))
    trainer.optimizer.zero_grad(set_to_none=True)
    first.grad, second.grad = torch.full_like(first, 1e6), torch.full_like(second, 1e-3)
    clip_gradients(trainer.optimizer)
    assert first.grad.norm() == pytest.approx(12.0, rel=1e-3)
    torch.testing.assert_close(second.grad, torch.full_like(second, 1e-3))
