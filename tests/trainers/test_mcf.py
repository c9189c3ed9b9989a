"""What MCFTrainer does in a step."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from torch.nn import functional

from lgssl_nnunet.engine.clipping import clip_gradients
from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.trainers import mcf


@pytest.fixture
def trainer(with_settings):
    return with_settings("MCFTrainer")


@pytest.fixture
def judged(monkeypatch):
    """Make the Dice losses of first and second network what is asked for."""

    def judge(first: float, second: float) -> None:
        values = iter([torch.tensor(first), torch.tensor(second)])
        monkeypatch.setattr(mcf, "dice_of_present_classes", lambda *arguments: next(values))

    return judge


def with_residual_encoder(plans: dict[str, Any]) -> None:
    """The network that ResEnc planners plan, one block per stage."""
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    kwargs = architecture["arch_kwargs"]
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")


def with_another_network(plans: dict[str, Any]) -> None:
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "somewhere.SwinUNETR"


def logits(trainer: Any, image: torch.Tensor) -> list[torch.Tensor]:
    """Full-resolution logits of both networks."""
    with torch.no_grad():
        return [network(image)[0] for network in (trainer.network.first, trainer.network.second)]


@pytest.mark.parametrize("changes", [None, with_residual_encoder])
def test_the_first_network_is_plain_and_the_second_residual_whatever_is_planned(started, changes):
    trainer = started("MCFTrainer", changes=changes)
    assert type(trainer.network.first.encoder) is PlainConvEncoder
    assert type(trainer.network.second.encoder) is ResidualEncoder
    assert math.isfinite(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))


def test_a_network_without_another_family_is_refused_before_anything_is_written(build, tmp_path):
    with pytest.raises(PlansError, match="SwinUNETR is neither"):
        build("MCFTrainer", changes=with_another_network, results=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_temperature_that_does_not_sharpen_is_refused(with_settings, temperature):
    with pytest.raises(UsageError, match="temperature"):
        with_settings("MCFTrainer", temperature=temperature)


def test_labelled_patches_are_learnt_and_reviewed_by_both(trainer, next_batches, values_of):
    labeled, unlabeled = next_batches(trainer)
    values = values_of(trainer, (labeled, unlabeled))
    p1, p2 = (z.softmax(1) for z in logits(trainer, labeled.image))
    differ = (p1.argmax(1) != p2.argmax(1))[:, None].float()
    label = functional.one_hot(labeled.target[0][:, 0].long(), 3).movedim(-1, 1)
    assert 0 < differ.mean() < 1
    for p, network, suffix in ((p1, trainer.network.first, ""), (p2, trainer.network.second, " second")):
        expected = float((differ * (p - label) ** 2).sum() / (3 * differ.sum()))
        assert values[f"rectification{suffix}"] == pytest.approx(expected, rel=1e-4)
        supervised = trainer.loss(network(labeled.image), labeled.target)
        assert values[f"supervised{suffix}"] == pytest.approx(float(supervised.detach()), rel=1e-4)


def test_the_network_with_the_lower_dice_loss_is_the_better_one(trainer, next_batches, terms_of, reached):
    for _ in range(4):
        labeled, unlabeled = next_batches(trainer)
        trainer.train_step(next(trainer.dataloader_train))
        label = functional.one_hot(labeled.target[0][:, 0].long(), 3).movedim(-1, 1)[:, 1:].float()
        present = label.sum((0, 2, 3, 4)) > 0
        losses = []
        for z in logits(trainer, labeled.image):
            p = z.softmax(1)[:, 1:]
            overlap, volumes = (p * label).sum((0, 2, 3, 4)), (p**2 + label**2).sum((0, 2, 3, 4))
            losses.append(float((1 - 2 * overlap / volumes)[present].mean()))
        term = terms_of(trainer, (labeled, unlabeled))["pseudo"]
        (learner,) = {name.split(".")[1] for name in reached(term.value, pair=trainer.network)}
        assert learner == ("second" if losses[0] < losses[1] else "first")


@pytest.mark.parametrize(
    ("first", "second", "learner"), [(0.3, 0.4, "second"), (0.4, 0.3, "first"), (0.3, 0.3, "first")]
)
def test_the_worse_network_learns_sharpened_probabilities_and_the_better_gets_no_gradient(
    trainer, next_batches, terms_of, reached, judged, first, second, learner
):
    judged(first, second)
    labeled, unlabeled = next_batches(trainer)
    term = terms_of(trainer, (labeled, unlabeled))["pseudo"]
    z1, z2 = logits(trainer, unlabeled.strong)
    student, writer = (z1, z2) if learner == "first" else (z2, z1)
    p = writer.softmax(1).double() ** 10
    expected = float((student.softmax(1) - p / p.sum(1, keepdim=True)).square().mean())
    assert float(term.value.detach()) == pytest.approx(expected, rel=1e-4)
    names = reached(term.value, pair=trainer.network)
    assert {name.split(".")[1] for name in names} == {learner}


def test_equal_networks_sharpen_themselves(trainer, next_batches, values_of):
    trainer.network.second = copy.deepcopy(trainer.network.first)
    labeled, unlabeled = next_batches(trainer)
    z = logits(trainer, unlabeled.strong)[0]
    values = values_of(trainer, (labeled, unlabeled))
    assert values["pseudo"] == pytest.approx(float((z.softmax(1) - (10 * z).softmax(1)).square().mean()), rel=1e-4)
    assert values["pseudo"] > 0
    assert values["rectification"] == values["rectification second"] == 0


def test_labelled_terms_reach_their_own_network_only(trainer, next_batches, terms_of, reached):
    for name, term in terms_of(trainer, next_batches(trainer)).items():
        if not term.uses_unlabeled:
            names = reached(term.value, pair=trainer.network)
            assert {key.split(".")[1] for key in names} == {"second" if name.endswith("second") else "first"}


def test_regions_are_reviewed_and_sharpened_each_by_itself(started, next_batches, values_of, judged):
    trainer = started("MCFTrainer", variant="regions")
    judged(0.3, 0.4)
    labeled, unlabeled = next_batches(trainer)
    values = values_of(trainer, (labeled, unlabeled))
    p1, p2 = (z.sigmoid() for z in logits(trainer, labeled.image))
    differ = ((p1 > 0.5) ^ (p2 > 0.5)).float()
    expected = (differ * (p1 - labeled.target[0].float()) ** 2).sum() / differ.sum()
    assert values["rectification"] == pytest.approx(float(expected), rel=1e-4)
    z1, z2 = logits(trainer, unlabeled.strong)
    assert values["pseudo"] == pytest.approx(float((z2.sigmoid() - (10 * z1).sigmoid()).square().mean()), rel=1e-4)


def test_voxels_to_ignore_are_not_reviewed(started, next_batches, values_of):
    trainer = started("MCFTrainer", variant="ignore")
    labeled, unlabeled = next_batches(trainer)
    ignore = trainer.label_manager.ignore_label
    blind = dataclasses.replace(labeled, target=[torch.full_like(scale, ignore) for scale in labeled.target])
    assert values_of(trainer, (labeled, unlabeled))["rectification"] > 0
    assert values_of(trainer, (blind, unlabeled))["rectification"] == 0


def test_weights_and_temperature_are_hyperparameters(with_settings, next_batches, terms_of):
    values = {"rectification_weight": 0.2, "pseudo_weight": 0.4, "ramp_fraction": 0.5, "temperature": 1.0}
    trainer = with_settings("MCFTrainer", **values)
    labeled, unlabeled = next_batches(trainer)
    weights = []
    for trainer.iteration in (0, 2):
        terms = terms_of(trainer, (labeled, unlabeled))
        assert [terms[f"rectification{suffix}"].weight for suffix in ("", " second")] == [0.2, 0.2]
        weights.append(terms["pseudo"].weight)
    assert weights == [pytest.approx(0.4 * math.exp(-5)), 0.4]
    p1, p2 = (z.softmax(1) for z in logits(trainer, unlabeled.strong))
    assert float(terms["pseudo"].value.detach()) == pytest.approx(float((p1 - p2).square().mean()), rel=1e-4)


def test_defaults_are_the_published_numbers(trainer, next_batches, terms_of):
    trainer.iteration = trainer.num_iterations
    terms = terms_of(trainer, next_batches(trainer))
    assert {name: term.weight for name, term in terms.items()} == {
        "supervised": 1.0,
        "supervised second": 1.0,
        "rectification": 0.5,
        "rectification second": 0.5,
        "pseudo": 0.1,
    }


def test_the_gradient_of_one_network_is_clipped_without_the_other(trainer):
    first, second = (next(net.parameters()) for net in (trainer.network.first, trainer.network.second))
    trainer.optimizer.zero_grad(set_to_none=True)
    first.grad, second.grad = torch.full_like(first, 1e6), torch.full_like(second, 1e-3)
    clip_gradients(trainer.optimizer)
    assert first.grad.norm() == pytest.approx(12.0, rel=1e-3)
    torch.testing.assert_close(second.grad, torch.full_like(second, 1e-3))


@pytest.mark.parametrize("variant", ["standard", "regions"])
def test_the_checkpoint_predicts_the_mean_probability_of_both(started, variant, tmp_path):
    trainer = started("MCFTrainer", variant=variant)
    trainer.save_checkpoint(tmp_path / "checkpoint.pth")
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=False)["network_weights"]
    rebuilt = trainer.another_network()
    rebuilt.load_state_dict(weights)
    image = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    turn = torch.sigmoid if variant == "regions" else lambda z: z.softmax(1)
    expected = sum(turn(z) for z in logits(trainer, image)) / 2
    torch.testing.assert_close(turn(rebuilt(image)[0]), expected)
