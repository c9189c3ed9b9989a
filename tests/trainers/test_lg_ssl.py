"""What LGSSLTrainer's own hyper-parameters do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lgssl_nnunet.engine.hyperparameters import request, resolve
from lgssl_nnunet.engine.seeding import seed_everything
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.trainers import lg_ssl

PROMPT_FEATURE = {"prompts.learnable", "prompts.project.weight"}
# Hyper-parameter -> value that is not its default, and what the network's builder gets.
SWITCHES = {
    "prompt_mode": ("fixed_volume", {"prompt_mode": "fixed_volume"}),
    "prompt_source": ("random", {"prompt_source": "random"}),
    "residual_gate": (False, {"gate_start": None}),
    "gate_start": (0.25, {"gate_start": 0.25}),
    "affine_norm": (False, {"affine_norm": False}),
    "stop_gradient": (False, {"stop_gradient": False}),
    "faithful_decoder": (True, {"faithful_decoder": True}),
    "dropout": (0.25, {"dropout": 0.25}),
    "prediction": ("mean", {"prediction": "mean"}),
    "tvsf_stages": (2, {"tvsf_stages": 2}),
}
# What of the hyper-parameters the loss reads and the network does not.
OF_THE_LOSS = {
    "agreement",
    "detach_labeled",
    "consistency_weight",
    "agreement_weight",
    "difference_weight",
    "ramp_fraction",
    "class_map_weight",
    "alignment_weight",
}


@pytest.fixture
def start(started):
    """LGSSLTrainer with hyper-parameters, ready for its first step."""
    return lambda **values: started("LGSSLTrainer", training={"seed": 0, "hyperparameters": values})


@pytest.fixture
def after_two_steps(start):
    """LGSSLTrainer with hyper-parameters after two steps, and the batches of the third."""

    def run(**values):
        trainer = start(**values)
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
        return trainer, trainer.to_batches(next(trainer.dataloader_train))

    return run


def terms(trainer):
    batches = trainer.to_batches(next(trainer.dataloader_train))
    seed_everything(0)
    return trainer.loss_terms(*batches)


def gradients(trainer, loss) -> dict[str, torch.Tensor]:
    """The gradients of a loss that are not zero everywhere."""
    trainer.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    named = trainer.network.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize(
    "values",
    [
        {"prompt_mode": "fixed_volume", "residual_gate": False, "affine_norm": False, "faithful_decoder": True},
        {"prompt_mode": "none"},
        {"prompt_source": "random"},
        {"prompt_source": "shuffled"},
        {"prompt_source": "learned"},
        {"tvsf_stages": 2, "class_map_weight": 1.0, "alignment_weight": 1.0},
        {"tvsf_stages": 2, "prompt_mode": "fixed_volume"},
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
        original = trainer.probabilities
        trainer.probabilities = lambda logits, of=original, seen=seen: seen.append(of(logits)) or seen[-1]
        difference = terms(trainer)["difference"].value
        for p in seen:
            p.retain_grad()
        difference.backward()
        assert len(seen) == 2
        for p in seen:
            labeled, unlabeled = p.grad.chunk(2)
            assert bool(labeled.any()) != detach
            assert bool(unlabeled.any())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("consistency_weight", -1.0),
        ("agreement_weight", -1.0),
        ("difference_weight", -1.0),
        ("class_map_weight", -1.0),
        ("alignment_weight", -1.0),
        ("tvsf_stages", 0),
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


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("mode", ["attention", "fixed_volume"])
def test_only_the_supervised_term_trains_the_prompt_feature(mode, after_two_steps):
    trainer, batches = after_two_steps(prompt_mode=mode)
    by_term = {
        name: set(gradients(trainer, trainer.loss_terms(*batches)[name].value))
        for name in ("supervised", "agreement", "difference")
    }
    assert by_term["supervised"] >= PROMPT_FEATURE
    for name in ("agreement", "difference"):
        assert any(parameter.startswith("fusion.") for parameter in by_term[name])
        assert not by_term[name] & PROMPT_FEATURE


@pytest.mark.parametrize("mode", ["attention", "fixed_volume"])
def test_without_stop_gradient_the_unlabelled_terms_train_it_too(mode, after_two_steps):
    trainer, batches = after_two_steps(prompt_mode=mode, stop_gradient=False)
    assert set(gradients(trainer, trainer.loss_terms(*batches)["agreement"].value)) >= PROMPT_FEATURE


def test_the_supervised_term_trains_both_decoders(start):
    trainer = start()
    found = gradients(trainer, terms(trainer)["supervised"].value)
    parts = {name.split(".")[0] for name in found}
    assert {"encoder", "decoder", "further_decoders", "fusion", "prompts"} <= parts


@pytest.mark.parametrize("mode", ["attention", "fixed_volume", "none"])
def test_unlabelled_patches_in_the_batch_leave_the_supervised_gradient_as_it_is(mode, after_two_steps):
    trainer, (labeled, unlabeled) = after_two_steps(prompt_mode=mode, dropout=0.0)
    together = gradients(trainer, trainer.loss_terms(labeled, unlabeled)["supervised"].value)
    *outputs, _ = trainer.network(labeled.image, labeled_rows=len(labeled.image))
    alone = gradients(trainer, sum(0.5 * trainer.supervised_loss(output, labeled.target) for output in outputs))
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-5)


def test_a_step_is_one_forward_pass_over_labelled_and_unlabelled_patches(start):
    trainer, calls = start(), []
    trainer.network.register_forward_pre_hook(
        lambda _, arguments, options: calls.append((len(arguments[0]), options)), with_kwargs=True
    )
    trainer.network.encoder.register_forward_pre_hook(lambda *_: calls.append("encoder"))
    trainer.train_step(next(trainer.dataloader_train))
    assert calls == [(4, {"labeled_rows": 2}), "encoder"]


# -------------------------------------------------------------------------------------------------- weights and options


@pytest.mark.parametrize("ramp", [0.0, 0.1, 1.0])
def test_weights_are_ramp_times_consistency_weight_times_their_own(ramp, start, monkeypatch):
    trainer, asked = start(consistency_weight=3.0, agreement_weight=2.0, difference_weight=0.5, ramp_fraction=0.25), []
    monkeypatch.setattr(trainer, "ramp", lambda fraction=1.0: asked.append(fraction) or ramp)
    weights = {name: term.weight for name, term in terms(trainer).items()}
    assert weights == {
        "supervised": 1.0,
        "agreement": pytest.approx(6.0 * ramp),
        "difference": pytest.approx(1.5 * ramp),
    }
    assert asked == [0.25]


def test_the_weights_of_a_run_rise_to_their_end_value_after_the_fraction_of_the_ramp(started):
    values = {"consistency_weight": 2.0, "ramp_fraction": 0.5}
    trainer = started("LGSSLTrainer", epochs=2, training={"seed": 0, "hyperparameters": values})
    batch = next(trainer.dataloader_train)
    weights = [trainer.train_step(batch)["weight of agreement"] for _ in range(trainer.num_iterations)]
    assert weights == pytest.approx([2 * math.exp(-5), 2 * math.exp(-1.25), 2.0, 2.0])


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_of_the_network_reaches_its_builder(name, build, monkeypatch):
    value, expected = SWITCHES[name]
    seen = {}
    monkeypatch.setattr(lg_ssl, "build_language_guided_unet", lambda *arguments, **options: seen.update(options))
    trainer = build("LGSSLTrainer", training={"seed": 0, "hyperparameters": {name: value}})
    trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3)
    assert value != getattr(lg_ssl.LGSSLHyperparameters(), name)
    assert {option: seen[option] for option in expected} == expected


def test_every_hyperparameter_belongs_to_the_network_or_to_the_loss_or_to_the_plans():
    names = {field.name for field in dataclasses.fields(lg_ssl.LGSSLHyperparameters)}
    assert names == set(SWITCHES) | OF_THE_LOSS | {"text_encoder"}


# ------------------------------------------------------------------------------------------- ties of words to positions


def test_ties_to_words_are_terms_of_the_labelled_patches(start):
    trainer = start(class_map_weight=0.5, alignment_weight=2.0)
    labeled, unlabeled = trainer.to_batches(next(trainer.dataloader_train))
    seed_everything(0)
    found = trainer.loss_terms(labeled, unlabeled)
    assert {name: found[name].weight for name in ("class map", "alignment")} == {"class map": 0.5, "alignment": 2.0}
    assert not any(found[name].uses_unlabeled for name in ("class map", "alignment"))
    seed_everything(0)
    others = trainer.loss_terms(labeled, dataclasses.replace(unlabeled, strong=torch.randn_like(unlabeled.strong)))
    for name in ("class map", "alignment"):
        torch.testing.assert_close(others[name].value, found[name].value)
    assert not torch.equal(others["agreement"].value, found["agreement"].value)


def test_ties_to_words_train_the_prompts_and_the_encoder_and_no_decoder(after_two_steps):
    trainer, batches = after_two_steps(class_map_weight=1.0, alignment_weight=1.0)
    by_map = set(gradients(trainer, trainer.loss_terms(*batches)["class map"].value))
    by_alignment = set(gradients(trainer, trainer.loss_terms(*batches)["alignment"].value))
    assert by_map >= {*PROMPT_FEATURE, "prompts.query.weight", "prompts.key.weight"}
    assert by_alignment >= PROMPT_FEATURE
    for found in (by_map, by_alignment):
        assert any(name.startswith("encoder.") for name in found)
        assert {name.split(".")[0] for name in found} == {"encoder", "prompts"}
    assert not any(name.startswith("prompts.query") for name in by_alignment)


def test_without_their_weights_the_losses_and_draws_are_those_of_before(start):
    plain, tied = terms(start()), terms(start(class_map_weight=1.0, alignment_weight=1.0))
    assert set(tied) - set(plain) == {"class map", "alignment"}
    for name, term in plain.items():
        assert torch.equal(term.value, tied[name].value)


def test_the_class_map_is_learned(start):
    trainer = start(class_map_weight=1.0)
    batch = next(trainer.dataloader_train)
    values = [float(trainer.train_step(batch)["class map"]) for _ in range(8)]
    assert values[-1] < 0.9 * values[0]


@pytest.mark.parametrize("mode", ["fixed_volume", "none"])
@pytest.mark.parametrize("name", ["class_map_weight", "alignment_weight"])
def test_ties_to_words_need_attention(mode, name, build):
    with pytest.raises(UsageError, match=f"prompt_mode={mode} leaves {name} without effect"):
        build("LGSSLTrainer", training={"seed": 0, "hyperparameters": {"prompt_mode": mode, name: 1.0}})


@pytest.mark.parametrize(
    ("choice", "name", "value"),
    [
        ({"prompt_mode": "none"}, "prompt_source", "random"),
        ({"prompt_mode": "none"}, "tvsf_stages", 2),
        ({"prompt_mode": "none"}, "text_encoder", "file:bank.npz"),
        ({"residual_gate": False}, "gate_start", 0.5),
    ],
)
def test_what_would_have_no_effect_is_refused_when_asked_for_and_stored_models_stay_usable(choice, name, value):
    defaults = lg_ssl.LGSSLHyperparameters()
    with pytest.raises(UsageError, match=f"leaves {name} without effect"):
        request(defaults, {**choice, name: value}, "LGSSLTrainer")
    request(defaults, choice, "LGSSLTrainer")
    request(defaults, {name: value}, "LGSSLTrainer")
    stored = {"lgssl": {"training": {"hyperparameters": {**choice, name: value}}}}
    planned = resolve(defaults, stored, "LGSSLTrainer")
    assert getattr(planned, name) == value
    assert request(planned, {"dropout": 0.1}, "LGSSLTrainer").dropout == 0.1
