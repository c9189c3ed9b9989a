"""What LGSSLTrainer's own hyper-parameters do."""

from __future__ import annotations

import math

import pytest
import torch

from lgssl_nnunet.engine.seeding import seed_everything
from lgssl_nnunet.errors import UsageError


@pytest.fixture
def start(started):
    """LGSSLTrainer with hyper-parameters, ready for its first step."""
    return lambda **values: started("LGSSLTrainer", training={"seed": 0, "hyperparameters": values})


def terms(trainer):
    batches = trainer.to_batches(next(trainer.dataloader_train))
    seed_everything(0)
    return trainer.loss_terms(*batches)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt_mode": "fixed_volume", "residual_gate": False, "affine_norm": False, "faithful_decoder": True},
        {"prompt_mode": "none"},
        {"prompt_source": "random"},
        {"prompt_source": "shuffled"},
        {"agreement": "distill"},
        {"detach_labeled": False},
        {"stop_gradient": False},
        {"prediction": "mean"},
        {"dropout": 0.0},
    ],
    ids=lambda values: " ".join(f"{name}={value}" for name, value in values.items()),
)
def test_every_choice_trains_a_step_and_predicts(values, start):
    trainer = start(**values)
    losses = trainer.train_step(next(trainer.dataloader_train))
    assert all(math.isfinite(float(value)) for value in losses.values())
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        assert math.isfinite(float(trainer.validation_step(next(trainer.dataloader_val))["loss"]))


def test_the_form_of_the_agreement_changes_that_term_alone(start):
    squared, distilled = terms(start()), terms(start(agreement="distill"))
    assert torch.equal(squared["supervised"].value, distilled["supervised"].value)
    assert torch.equal(squared["difference"].value, distilled["difference"].value)
    assert distilled["agreement"].value > squared["agreement"].value


def test_labelled_predictions_follow_the_difference_term_only_when_asked(start):
    for detach in (True, False):
        trainer = start(detach_labeled=detach)
        seen = []
        split = trainer._split
        trainer._split = lambda logits, n, split=split, seen=seen: seen.append(split(logits, n)) or seen[-1]
        difference = terms(trainer)["difference"].value
        labeled = [p for p, _ in seen]
        for p in labeled:
            p.retain_grad()
        difference.backward()
        assert all((p.grad is None) == detach for p in labeled)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("consistency_weight", -1.0),
        ("difference_weight", -1.0),
        ("ramp_fraction", 1.5),
        ("prompt_mode", "words"),
        ("prompt_source", "latin"),
        ("agreement", "cubed"),
        ("prediction", "second"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name, value, build):
    with pytest.raises(UsageError, match=name):
        build("LGSSLTrainer", training={"seed": 0, "hyperparameters": {name: value}})
