"""What MeanTeacherTrainer does in a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch


def test_the_consistency_is_zero_for_a_teacher_equal_to_the_student_on_one_view_without_noise(
    with_settings, next_batches, values_of
):
    trainer = with_settings("MeanTeacherTrainer", noise=0)
    labeled, unlabeled = next_batches(trainer)
    one_view = dataclasses.replace(unlabeled, strong=unlabeled.weak)
    assert values_of(trainer, (labeled, one_view))["consistency"] < 1e-12
    assert values_of(trainer, (labeled, unlabeled))["consistency"] > 1e-9


def test_the_consistency_is_the_mean_squared_difference_of_probabilities(with_settings, next_batches, values_of):
    trainer = with_settings("MeanTeacherTrainer", noise=0)
    trainer.train_step(next(trainer.dataloader_train))
    trainer.train_step(next(trainer.dataloader_train))
    labeled, unlabeled = next_batches(trainer)
    with torch.no_grad():
        student = torch.softmax(trainer.network(unlabeled.strong)[0], dim=1)
        teacher = torch.softmax(trainer.teacher.network(unlabeled.weak)[0], dim=1)
    expected = float(((student - teacher) ** 2).mean())
    assert values_of(trainer, (labeled, unlabeled))["consistency"] == pytest.approx(expected, rel=1e-4)


def test_noise_reaches_the_teacher_alone(with_settings, next_batches, values_of):
    quiet, loud = (with_settings("MeanTeacherTrainer", noise=noise) for noise in (0, 0.5))
    batches = next_batches(quiet)
    before, after = values_of(quiet, batches), values_of(loud, batches)
    assert before["supervised"] == after["supervised"]
    assert before["consistency"] != after["consistency"]


def test_the_weight_rises_to_its_end_by_the_ramp(with_settings, next_batches, terms_of):
    trainer = with_settings("MeanTeacherTrainer", consistency_weight=0.3, ramp_fraction=0.5)
    batches = next_batches(trainer)
    trainer.iteration = 0
    assert terms_of(trainer, batches)["consistency"].weight == pytest.approx(0.3 * math.exp(-5))
    trainer.iteration = 2  # half of the four iterations
    assert terms_of(trainer, batches)["consistency"].weight == pytest.approx(0.3)


def test_the_decay_is_that_of_the_hyperparameters(with_settings):
    assert with_settings("MeanTeacherTrainer", teacher_decay=0.5).teacher.decay == 0.5


def test_the_teacher_after_three_equal_weights_is_their_mean(with_settings):
    # methods.md section 12: with the warm-up 0, 1/2, 2/3 the average of three students is their plain mean.
    trainer = with_settings("MeanTeacherTrainer")
    (first, *_) = trainer.network.parameters()
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            first.fill_(value)
        trainer.teacher.update(trainer.network)
    (averaged, *_) = trainer.teacher.network.parameters()
    torch.testing.assert_close(averaged, torch.full_like(averaged, 3.0))


def test_both_terms_train_the_student(with_settings, next_batches, terms_of, reached):
    trainer = with_settings("MeanTeacherTrainer")
    terms = terms_of(trainer, next_batches(trainer))
    networks = {"student": trainer.network, "teacher": trainer.teacher.network}
    for term in terms.values():
        names = reached(term.value, **networks)
        assert {name.split(".")[0] for name in names} == {"student"}
        assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}
