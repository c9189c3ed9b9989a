"""What ACMTTrainer does in a step."""

from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.losses.uncertainty import entropy

VARIANTS = ("entropy", "uncertainty", "label_error", "prototype")


def views(trainer, batches):
    _, unlabeled = batches
    with torch.no_grad():
        student = torch.softmax(trainer.network(unlabeled.strong)[0], dim=1)
    return student, unlabeled.weak


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rule_trains_a_step(variant, with_settings):
    trainer = with_settings("ACMTTrainer", variant=variant, passes=2)
    values = trainer.train_step(next(trainer.dataloader_train))
    assert ("entropy" in values) == (variant == "prototype")
    assert all(torch.isfinite(torch.as_tensor(value)) for value in values.values())


@pytest.mark.parametrize("variant", ["label_error", "prototype"])
def test_rules_that_need_one_class_per_voxel_refuse_regions(variant, build, tmp_path):
    settings = {"seed": 0, "hyperparameters": {"variant": variant}}
    with pytest.raises(UsageError, match="needs one class per voxel"):
        build("ACMTTrainer", variant="regions", results=tmp_path, training=settings)
    assert not list(tmp_path.iterdir())


def test_the_other_rules_train_regions(started):
    for variant in ("entropy", "uncertainty"):
        settings = {"seed": 0, "hyperparameters": {"variant": variant, "passes": 2}}
        trainer = started("ACMTTrainer", variant="regions", training=settings)
        assert trainer.train_step(next(trainer.dataloader_train))["loss"] > -10


def test_a_uniform_prediction_is_ambiguous_and_a_certain_one_is_not(with_settings, next_batches):
    trainer = with_settings("ACMTTrainer")
    image = next_batches(trainer)[1].weak
    uniform = torch.full((2, 3, *image.shape[2:]), 1 / 3)
    certain = torch.zeros_like(uniform)
    certain[:, 1] = 1
    for trainer.iteration in (0, 4):
        assert trainer._ambiguous(uniform, image).all()
        assert not trainer._ambiguous(certain, image).any()


def test_the_consistency_is_the_squared_difference_over_ambiguous_voxels_and_channels(
    with_settings, next_batches, values_of
):
    trainer = with_settings("ACMTTrainer", first_threshold=0.9, last_threshold=0.9, noise=0, dropout=0)
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    labeled, unlabeled = next_batches(trainer)
    student, _ = views(trainer, (labeled, unlabeled))
    with torch.no_grad():
        teacher = torch.softmax(trainer.teacher.network(unlabeled.weak)[0], dim=1)
    kept = entropy(student, False) >= 0.9 * torch.log(torch.tensor(3.0))
    assert 0 < kept.float().mean() < 1
    expected = float(((student - teacher).square() * kept).sum() / (3 * kept.sum()))
    assert values_of(trainer, (labeled, unlabeled))["consistency"] == pytest.approx(expected, rel=1e-3)


def test_at_equal_thresholds_it_selects_what_uncertainty_awareness_leaves_out(with_settings, next_batches):
    trainer = with_settings("ACMTTrainer", first_threshold=0.9, last_threshold=0.9, dropout=0)
    student, image = views(trainer, next_batches(trainer))
    certain = entropy(student, False) < 0.9 * torch.log(torch.tensor(3.0))
    assert torch.equal(trainer._ambiguous(student, image), ~certain)


def test_the_uncertainty_rule_without_noise_and_dropout_is_the_entropy_rule(with_settings, next_batches):
    entropies, passes = (
        with_settings("ACMTTrainer", variant=variant, noise=0, dropout=0, passes=2, first_threshold=0.9)
        for variant in ("entropy", "uncertainty")
    )
    passes.network.load_state_dict(entropies.network.state_dict())
    _, unlabeled = next_batches(entropies)
    with torch.no_grad():
        student = torch.softmax(entropies.network(unlabeled.weak)[0], dim=1)
    found = [trainer._ambiguous(student, unlabeled.weak) for trainer in (entropies, passes)]
    assert (found[0] == found[1]).float().mean() > 0.999
    assert 0 < found[0].float().mean() < 1


def test_thresholds_move_from_first_to_last(with_settings, next_batches):
    trainer = with_settings("ACMTTrainer", first_threshold=0.2, last_threshold=0.999)
    student, image = views(trainer, next_batches(trainer))
    kept = []
    for trainer.iteration in (0, 4):
        kept.append(float(trainer._ambiguous(student, image).float().mean()))
    assert kept[0] > kept[1]


def test_the_label_rule_looks_at_no_more_voxels_than_asked_for(with_settings, next_batches):
    trainer = with_settings("ACMTTrainer", variant="label_error", sampled_voxels=50)
    student, image = views(trainer, next_batches(trainer))
    assert trainer._ambiguous(student, image).sum() <= 50


def test_the_prototype_rule_minimises_the_entropy_of_the_other_voxels(with_settings, next_batches, terms_of):
    trainer = with_settings("ACMTTrainer", variant="prototype", passes=2, entropy_weight=0.5)
    trainer.iteration = 4
    batches = next_batches(trainer)
    terms = terms_of(trainer, batches)
    assert terms["entropy"].weight == 0.5 * terms["consistency"].weight
    assert 0 < terms["entropy"].value < torch.log(torch.tensor(3.0))


def test_resuming_by_the_prototype_rule_ends_as_an_uninterrupted_run_to_the_bit(check_resuming):
    values = {"variant": "prototype", "passes": 2}
    check_resuming("ACMTTrainer", iterations=1, training={"seed": 0, "hyperparameters": values})


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_the_student_and_nothing_else(variant, with_settings, next_batches, terms_of, reached):
    trainer = with_settings("ACMTTrainer", variant=variant, passes=2, first_threshold=0.1, last_threshold=0.1)
    for term in terms_of(trainer, next_batches(trainer)).values():
        if term.value.requires_grad:
            names = reached(term.value, student=trainer.network, teacher=trainer.teacher.network)
            assert {name.split(".")[0] for name in names} == {"student"}


def test_hyperparameters_reach_weight_teacher_and_noise(with_settings, next_batches, terms_of, values_of):
    trainer = with_settings("ACMTTrainer", consistency_weight=0.6, ramp_fraction=0.5, teacher_decay=0.8)
    batches = next_batches(trainer)
    trainer.iteration = 2
    assert terms_of(trainer, batches)["consistency"].weight == 0.6
    assert trainer.teacher.decay == 0.8
    loud = with_settings("ACMTTrainer", noise=1.0, first_threshold=0, last_threshold=0)
    quiet = with_settings("ACMTTrainer", noise=0.0, first_threshold=0, last_threshold=0)
    assert values_of(loud, batches)["consistency"] != values_of(quiet, batches)["consistency"]
