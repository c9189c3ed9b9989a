"""What BCPTrainer does in a step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lgssl_nnunet.losses.weighted import weighted_dice_and_cross_entropy


def second_stage(trainer):
    """The trainer in its second stage, at an even iteration: the first row is labelled outside of its box."""
    trainer.iteration = 2
    return trainer


@pytest.fixture
def seen():
    """The images that a trainer's network gets."""

    def record(trainer):
        images = []
        trainer.network.register_forward_pre_hook(lambda module, inputs: images.append(inputs[0]))
        return images

    return record


def test_rows_are_pasted_into_each_other_in_both_directions(with_settings, next_batches, terms_of, seen):
    trainer = second_stage(with_settings("BCPTrainer"))
    labeled, unlabeled = next_batches(trainer)
    images = seen(trainer)
    terms_of(trainer, (labeled, unlabeled))
    (mixture,) = images
    of_unlabeled = (mixture == unlabeled.strong).all(dim=1)
    shape = mixture.shape[2:]
    inside = 1
    for edge in shape:
        inside *= int(2 / 3 * edge + 1e-9)
    total = shape[0] * shape[1] * shape[2]
    assert of_unlabeled[0].sum() == inside
    assert of_unlabeled[1].sum() == total - inside
    assert torch.equal(mixture[:, 0][~of_unlabeled], labeled.image[:, 0][~of_unlabeled])


def test_with_a_full_box_each_row_is_either_labelled_or_pseudo_labelled(with_settings, next_batches, values_of):
    # methods.md section 11: the loss is the supervised one on one patch and the pseudo-labelled one on the other.
    trainer = second_stage(with_settings("BCPTrainer", box=1.0))
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        outputs = trainer.network(torch.stack([unlabeled.strong[0], labeled.image[1]]))
        pseudo = trainer.probabilities(trainer.teacher(unlabeled.strong)).argmax(dim=1, keepdim=True)
    label = torch.cat([trainer.one_hot(pseudo)[:1], trainer.one_hot(labeled.target)[1:]])

    def loss(row):
        return trainer.at_every_scale(
            lambda z, y: weighted_dice_and_cross_entropy(z, y, torch.ones_like(y[:, :1]), False),
            [scale[row : row + 1] for scale in outputs],
            label[row : row + 1],
        )

    values = values_of(trainer, (labeled, unlabeled))
    assert values["labelled voxels"] == pytest.approx(float(loss(1)) / 2, rel=1e-4)
    assert values["pseudo-labelled voxels"] == pytest.approx(float(loss(0)) / 2, rel=1e-4)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_both_directions_count_alike_however_many_of_their_voxels_are_labelled(
    batch_dice, with_settings, next_batches, values_of, monkeypatch
):
    # The loss of a direction is its number of labelled voxels, which is larger for the row whose box is pasted.
    trainer = second_stage(with_settings("BCPTrainer"))
    trainer.configuration_manager.configuration["batch_dice"] = batch_dice
    seen = []

    def labelled_share(z, y, weight, **options):
        seen.append((len(z), options["batch_dice"]))
        return weight.mean() + 0 * z.sum()

    monkeypatch.setattr("lgssl_nnunet.trainers.bcp.weighted_dice_and_cross_entropy", labelled_share)
    trainer.loss.weight_factors = [1.0, *[0.0] * (len(trainer.loss.weight_factors) - 1)]
    batches = next_batches(trainer)
    values = values_of(trainer, batches)
    assert seen == [(1, batch_dice)] * 4
    assert values["labelled voxels"] == pytest.approx(0.5, abs=1e-6)
    assert values["pseudo-labelled voxels"] == pytest.approx(0.5, abs=1e-6)


def test_equal_patches_with_right_pseudo_labels_are_not_changed_by_mixing(
    with_settings, next_batches, terms_of, seen, monkeypatch
):
    trainer = second_stage(with_settings("BCPTrainer"))
    labeled, unlabeled = next_batches(trainer)
    equal = dataclasses.replace(unlabeled, strong=labeled.image)
    right = trainer.one_hot(labeled.target)
    monkeypatch.setattr("lgssl_nnunet.trainers.bcp.hard_labels", lambda p, regions: right)
    images, losses = seen(trainer), []
    monkeypatch.setattr(
        "lgssl_nnunet.trainers.bcp.weighted_dice_and_cross_entropy",
        lambda z, y, w, **_: losses.append((y, w)) or z.sum() * 0,
    )
    terms_of(trainer, (labeled, equal))
    assert torch.equal(images[0], labeled.image)
    full_resolution = [(y, w) for y, w in losses if y.shape[1:] == right.shape[1:]]
    # Row 1 is the one whose surroundings are pasted, and its direction comes first.
    assert all(torch.equal(y, right[row : row + 1]) for (y, _), row in zip(full_resolution, (1, 0, 1, 0), strict=True))
    known, pseudo = (torch.cat([w for _, w in pair]) for pair in (full_resolution[:2], full_resolution[2:]))
    assert torch.equal(known + pseudo, torch.ones_like(known))


def test_the_first_stage_mixes_labelled_patches_alone(with_settings, next_batches, values_of, seen):
    trainer = with_settings("BCPTrainer", pretraining_fraction=1.0)
    labeled, unlabeled = next_batches(trainer)
    images = seen(trainer)
    values = values_of(trainer, (labeled, unlabeled))
    assert values["pseudo-labelled voxels"] == pytest.approx(0, abs=1e-6)
    assert values["labelled voxels"] > 0
    from_labeled = (images[0] == labeled.image) | (images[0] == labeled.image.roll(1, dims=0))
    assert from_labeled.all()


def test_the_first_stage_without_a_box_is_the_baseline(with_settings, next_batches, values_of, seen):
    trainer = with_settings("BCPTrainer", pretraining_fraction=1.0, box=0.0)
    labeled, unlabeled = next_batches(trainer)
    images = seen(trainer)
    for trainer.iteration in (0, 1):
        values_of(trainer, (labeled, unlabeled))
    assert [torch.equal(image, labeled.image) for image in images] == [True, True]


def test_the_first_stage_shows_every_patch_from_inside_and_outside(with_settings, next_batches, values_of, seen):
    trainer = with_settings("BCPTrainer", pretraining_fraction=1.0)
    labeled, unlabeled = next_batches(trainer)
    images = seen(trainer)
    for trainer.iteration in (0, 1):
        values_of(trainer, (labeled, unlabeled))
    for mixture in images:
        own = (mixture == labeled.image).all(dim=1)
        assert (own.flatten(1).sum(1) > own[0].numel() / 2).all()  # a box of two thirds holds 30 % of the voxels


def test_the_first_stage_ends_after_its_share_of_the_iterations(with_settings, next_batches, values_of):
    trainer = with_settings("BCPTrainer", pretraining_fraction=0.5)
    batches = next_batches(trainer)
    pseudo = []
    for trainer.iteration in (0, 1, 2, 3):
        pseudo.append(values_of(trainer, batches)["pseudo-labelled voxels"] > 1e-6)
    assert pseudo == [False, False, True, True]


def test_voxels_to_ignore_are_not_learnt(started, next_batches, values_of):
    trainer = second_stage(started("BCPTrainer", variant="ignore"))
    labeled, unlabeled = next_batches(trainer)
    ignore = trainer.label_manager.ignore_label
    blind = dataclasses.replace(labeled, target=[torch.full_like(scale, ignore) for scale in labeled.target])
    values = values_of(trainer, (blind, unlabeled))
    assert values["labelled voxels"] == pytest.approx(0, abs=1e-6)
    assert values["pseudo-labelled voxels"] > 0


def test_the_teacher_writes_the_pseudo_labels_and_gets_no_gradient(with_settings, next_batches, terms_of, reached):
    trainer = second_stage(with_settings("BCPTrainer"))
    terms = terms_of(trainer, next_batches(trainer))
    for term in terms.values():
        names = reached(term.value, student=trainer.network, teacher=trainer.teacher.network)
        assert {name.split(".")[0] for name in names} == {"student"}


def test_hyperparameters_reach_weight_and_teacher(with_settings, next_batches, terms_of):
    trainer = second_stage(with_settings("BCPTrainer", pseudo_weight=0.3, teacher_decay=0.7))
    assert terms_of(trainer, next_batches(trainer))["pseudo-labelled voxels"].weight == 0.3
    assert trainer.teacher.decay == 0.7
