"""What TACTrainer does in a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.losses.prototypes import prototype_consistency

PROTOTYPES = ("gated skips", "encoder")


def all_ignored(trainer, labeled):
    ignore = trainer.label_manager.ignore_label
    return dataclasses.replace(labeled, target=[torch.full_like(scale, ignore) for scale in labeled.target])


@pytest.fixture
def trainer(with_settings):
    return with_settings("TACTrainer")


def test_a_copy_of_the_labelled_batch_with_perfect_predictions_costs_nothing(with_settings, next_batches, values_of):
    for denominator in ("sample", "batch"):
        trainer = with_settings("TACTrainer", denominator=denominator)
        labeled, unlabeled = next_batches(trainer)
        perfect = trainer.one_hot(labeled.target)
        trainer.probabilities = lambda outputs, perfect=perfect: perfect
        copied = values_of(trainer, (labeled, dataclasses.replace(unlabeled, strong=labeled.image)))
        others = values_of(trainer, (labeled, unlabeled))
        for name in PROTOTYPES:
            assert copied[name] == pytest.approx(0, abs=1e-10)
            assert others[name] > 1e-4


@pytest.mark.parametrize("variant", ["standard", "regions"])
def test_the_terms_compare_prototypes_of_the_gated_skips_and_of_the_whole_encoder(
    variant, started, next_batches, values_of
):
    trainer = started("TACTrainer", variant=variant)
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        logits, encoded, gated = trainer.network(torch.cat([labeled.image, unlabeled.strong]), with_skips=True)
    assert len(encoded) == len(gated) + 1 == len(trainer.network.decoder.stages) + 1
    unlabeled_logits = logits[0][2:]
    if variant == "regions":
        # The loader gives one channel per region already.
        truth, predicted = labeled.target[0].float(), torch.sigmoid(unlabeled_logits)
    else:
        classes = torch.arange(3).view(1, 3, 1, 1, 1)
        truth, predicted = (labeled.target[0] == classes).float(), torch.softmax(unlabeled_logits, dim=1)
    values = values_of(trainer, (labeled, unlabeled))
    for name, features in (("gated skips", gated), ("encoder", encoded)):
        expected = prototype_consistency(features, truth, predicted, min_voxels=4)
        assert values[name] == pytest.approx(float(expected), rel=1e-4)


def test_supervised_is_the_loss_of_nnunet_on_the_labelled_patches(trainer, next_batches, values_of):
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        alone = trainer.supervised_loss(trainer.network(labeled.image), labeled.target)
    assert values_of(trainer, (labeled, unlabeled))["supervised"] == pytest.approx(float(alone), rel=1e-4)


def test_voxels_to_ignore_have_no_part_in_a_prototype(started, next_batches, terms_of):
    trainer = started("TACTrainer", variant="ignore")
    labeled, unlabeled = next_batches(trainer)
    ignore = trainer.label_manager.ignore_label
    half = [scale.clone() for scale in labeled.target]
    half[0][..., : half[0].shape[-1] // 2] = ignore
    before = terms_of(trainer, (dataclasses.replace(labeled, target=half), unlabeled))
    labels = trainer.one_hot(half)
    assert (labels[..., : half[0].shape[-1] // 2] == 0).all()
    with torch.no_grad():
        logits, encoded, _ = trainer.network(torch.cat([labeled.image, unlabeled.strong]), with_skips=True)
    expected = prototype_consistency(encoded, labels, torch.softmax(logits[0][2:], dim=1), min_voxels=4)
    assert float(before["encoder"].value.detach()) == pytest.approx(float(expected), rel=1e-4)
    blind = terms_of(trainer, (all_ignored(trainer, labeled), unlabeled))
    assert all(blind[name].value == 0 for name in PROTOTYPES)


# ------------------------------------------------------------------------------------------------------------ gradients


def test_every_term_trains_encoder_gates_and_decoder(trainer, next_batches, terms_of, reached):
    for term in terms_of(trainer, next_batches(trainer)).values():
        names = reached(term.value, network=trainer.network)
        assert {name.split(".")[1] for name in names} == {"encoder", "gates", "decoder"}


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_labelled_patches_follow_the_unlabelled_ones_only_when_asked(
    stop_gradient, with_settings, next_batches, terms_of
):
    trainer = with_settings("TACTrainer", stop_gradient=stop_gradient)
    labeled, unlabeled = next_batches(trainer)
    labeled.image.requires_grad_()
    unlabeled.strong.requires_grad_()
    for name in PROTOTYPES:
        labeled.image.grad = unlabeled.strong.grad = None
        terms_of(trainer, (labeled, unlabeled))[name].value.backward()
        assert (labeled.image.grad.abs().max() == 0) == stop_gradient
        assert unlabeled.strong.grad.abs().max() > 0


def test_the_unlabelled_masks_have_a_gradient(trainer, next_batches, terms_of):
    seen, probabilities = [], trainer.probabilities
    trainer.probabilities = lambda outputs: seen.append(probabilities(outputs)) or seen[-1]
    terms = terms_of(trainer, next_batches(trainer))
    seen[0].retain_grad()
    terms["encoder"].value.backward()
    assert seen[0].grad.abs().max() > 0


# -------------------------------------------------------------------------------------------------------------- options


def test_weights_follow_the_ramp(with_settings, next_batches, terms_of):
    trainer = with_settings("TACTrainer", attention_weight=3.0, encoder_weight=2.0, ramp_fraction=0.5)
    batches, weights = next_batches(trainer), []
    for trainer.iteration in (0, 2):
        terms = terms_of(trainer, batches)
        weights.append([terms[name].weight for name in PROTOTYPES])
        assert terms["supervised"].weight == 1
    assert weights == [pytest.approx([3 * math.exp(-5), 2 * math.exp(-5)]), [3.0, 2.0]]


@pytest.mark.parametrize(
    ("name", "value", "argument"),
    [
        ("denominator", "batch", "denominator"),
        ("min_voxels", 1000.0, "min_voxels"),
        ("mask_resize", "area", "resize"),
        ("stop_gradient", False, "stop_gradient"),
    ],
)
def test_every_switch_reaches_the_loss(name, value, argument, with_settings, next_batches, values_of, monkeypatch):
    default, changed = with_settings("TACTrainer"), with_settings("TACTrainer", **{name: value})
    batches = next_batches(default)
    before, after = values_of(default, batches), values_of(changed, batches)
    for term in PROTOTYPES:
        assert (before[term] == after[term]) == (name == "stop_gradient")
    seen = []
    monkeypatch.setattr(
        "lgssl_nnunet.trainers.tac.prototype_consistency",
        lambda features, **options: seen.append(options) or features[0].sum() * 0,
    )
    values_of(changed, batches)
    assert [options[argument] for options in seen] == [value] * 2


def test_pairs_of_samples_need_as_many_unlabelled_as_labelled_patches(build, started, tmp_path):
    training = {"seed": 0, "unlabeled_batch_size": 3, "hyperparameters": {"denominator": "batch"}}
    with pytest.raises(UsageError, match="pairs every labelled with an unlabelled patch"):
        build("TACTrainer", results=tmp_path, training=training)
    assert not list(tmp_path.iterdir())
    equal = started("TACTrainer", training={**training, "unlabeled_batch_size": 2})
    assert math.isfinite(float(equal.train_step(next(equal.dataloader_train))["loss"]))
    trainer = started("TACTrainer", training={"seed": 0, "unlabeled_batch_size": 3})
    assert math.isfinite(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_weight", -1.0),
        ("encoder_weight", -1.0),
        ("ramp_fraction", 1.5),
        ("denominator", "volume"),
        ("min_voxels", -1.0),
        ("mask_resize", "linear"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name, value, build):
    with pytest.raises(UsageError, match=name):
        build("TACTrainer", training={"seed": 0, "hyperparameters": {name: value}})
