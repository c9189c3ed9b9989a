"""What UAMTTrainer does in a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch


def one_view(batches):
    labeled, unlabeled = batches
    return labeled, dataclasses.replace(unlabeled, strong=unlabeled.weak)


def test_without_noise_and_dropout_an_equal_teacher_leaves_no_consistency(with_settings, next_batches, values_of):
    trainer = with_settings("UAMTTrainer", noise=0, dropout=0)
    batches = next_batches(trainer)
    trainer.iteration = 4  # at the end every voxel is certain
    assert values_of(trainer, one_view(batches))["consistency"] < 1e-12
    assert values_of(trainer, batches)["consistency"] > 1e-9


def test_with_every_voxel_certain_it_is_mean_teacher(with_settings, next_batches, values_of):
    uncertain = with_settings("UAMTTrainer", noise=0, dropout=0, passes=1)
    uncertain.iteration = 4
    plain = with_settings("MeanTeacherTrainer", noise=0)
    plain.network.load_state_dict(uncertain.network.state_dict())
    plain.teacher.load_state_dict(uncertain.teacher.state_dict())
    batches = next_batches(uncertain)
    expected = values_of(plain, batches)["consistency"]
    assert values_of(uncertain, batches)["consistency"] == pytest.approx(expected, rel=1e-5)


def test_a_uniform_teacher_is_never_certain_before_the_end(with_settings, next_batches, values_of, monkeypatch):
    trainer = with_settings("UAMTTrainer")
    batches = next_batches(trainer)
    uniform = torch.full((2, 3, *batches[1].weak.shape[2:]), 1 / 3)
    monkeypatch.setattr(trainer, "_teacher_pass", lambda image: uniform)
    for trainer.iteration in (0, 3):
        assert values_of(trainer, batches)["consistency"] == 0


def test_only_voxels_below_the_threshold_count(with_settings, next_batches, values_of, monkeypatch):
    trainer = with_settings("UAMTTrainer", first_threshold=0.5, last_threshold=0.5, dropout=0)
    labeled, unlabeled = next_batches(trainer)
    sure = torch.zeros(2, 3, *unlabeled.weak.shape[2:])
    sure[:, 0], sure[:, 1] = 0.98, 0.02
    unsure = torch.full_like(sure, 1 / 3)
    half = torch.zeros_like(sure, dtype=torch.bool)
    half[:, :, : sure.shape[2] // 2] = True
    mixed = torch.where(half, sure, unsure)
    monkeypatch.setattr(trainer, "_teacher_pass", lambda image: mixed)
    with torch.no_grad():
        student = torch.softmax(trainer.network(unlabeled.strong)[0], dim=1)
    expected = float((student - mixed)[half].square().mean())
    assert values_of(trainer, (labeled, unlabeled))["consistency"] == pytest.approx(expected, rel=1e-4)


def test_the_threshold_rises_to_the_entropy_of_a_uniform_prediction(with_settings):
    trainer = with_settings("UAMTTrainer")
    trainer.iteration = 0
    assert trainer._threshold(2) == pytest.approx(0.521028, abs=1e-6)
    trainer.iteration = 4
    assert trainer._threshold(2) == math.log(2)
    assert trainer._threshold(3) == math.log(3)


def test_passes_of_the_teacher_differ_by_dropout_alone(with_settings, next_batches):
    # methods.md 1.4, R6: without noise the variance over the passes must be positive.
    _, unlabeled = next_batches(trainer := with_settings("UAMTTrainer", noise=0))
    passes = torch.stack([trainer._teacher_pass(unlabeled.weak) for _ in range(4)])
    assert passes.var(dim=0).max() > 1e-6
    assert not trainer.teacher.network.training


def test_passes_of_the_teacher_differ_by_noise_alone(with_settings, next_batches, values_of):
    trainer, shown = with_settings("UAMTTrainer", dropout=0, noise=0.1, passes=3), []
    trainer.teacher.network.register_forward_pre_hook(lambda _, arguments: shown.append(arguments[0]))
    batches = next_batches(trainer)
    values_of(trainer, batches)
    noise = torch.stack(shown) - batches[1].weak
    assert noise.std().item() == pytest.approx(0.1, rel=0.1)
    assert noise.var(dim=0).min() > 0


def test_one_pass_is_the_target_and_the_others_are_for_the_uncertainty(with_settings, next_batches, values_of):
    trainer = with_settings("UAMTTrainer", passes=5)
    calls = []
    trainer.teacher.network.register_forward_hook(lambda *_: calls.append(1))
    values_of(trainer, next_batches(trainer))
    assert len(calls) == 6


def test_gradients_reach_the_student_and_nothing_else(with_settings, next_batches, terms_of, reached):
    trainer = with_settings("UAMTTrainer")
    trainer.iteration = 4
    for term in terms_of(trainer, next_batches(trainer)).values():
        names = reached(term.value, student=trainer.network, teacher=trainer.teacher.network)
        assert {name.split(".")[0] for name in names} == {"student"}
        assert {name.split(".")[1] for name in names} == {"encoder", "decoder"}


def test_prediction_draws_no_dropout_and_equals_the_planned_network(with_settings, next_batches, stock_network):
    trainer = with_settings("UAMTTrainer")
    labeled, _ = next_batches(trainer)
    stock = stock_network(trainer.configuration_manager)
    stock.load_state_dict(trainer.network.state_dict(), strict=False)
    with torch.no_grad():
        expected, found = (net.eval()(labeled.image)[0] for net in (stock, trainer.network))
    torch.testing.assert_close(found, expected)  # the memory layouts differ


def test_hyperparameters_reach_weight_and_teacher(with_settings, next_batches, terms_of):
    trainer = with_settings("UAMTTrainer", consistency_weight=0.6, ramp_fraction=0.5, teacher_decay=0.8)
    batches = next_batches(trainer)
    trainer.iteration = 2
    assert terms_of(trainer, batches)["consistency"].weight == 0.6
    assert trainer.teacher.decay == 0.8
