"""What MCNetPlusTrainer does in a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from lgssl_nnunet.engine.batches import rows
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.losses.consistency import mutual_consistency

CONSISTENCIES = ("labelled consistency", "consistency")


@pytest.fixture
def calm(with_settings):
    """A trainer without dropout, and with a ramp that has ended."""
    return with_settings("MCNetPlusTrainer", dropout=0.0, ramp_fraction=0.0)


def parts(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[1:3]) if "further" in name else name.split(".")[1] for name in names}


# -------------------------------------------------------------------------------------------------------------- network


def test_the_decoders_upsample_by_transposed_convolution_linearly_and_by_the_nearest_voxel(calm):
    first, (linear, nearest) = calm.network.decoder, calm.network.further_decoders
    assert all(isinstance(step, nn.ConvTranspose3d) for step in first.transpconvs)
    for decoder, mode in ((linear, "trilinear"), (nearest, "nearest")):
        for step in decoder.transpconvs:
            convolution, upsample = step
            assert convolution.kernel_size == (1, 1, 1)
            assert upsample.mode == mode


def test_faithful_decoders_interpolate_and_then_convolve(with_settings):
    trainer = with_settings("MCNetPlusTrainer", faithful_decoder=True)
    for decoder, align in zip(trainer.network.further_decoders, (True, None), strict=True):
        for upsample, convolution in decoder.transpconvs:
            assert upsample.align_corners is align
            assert convolution.conv.kernel_size == (3, 3, 3)
    trainer.train_step(next(trainer.dataloader_train))


def test_two_decoders_are_mc_net(with_settings):
    trainer = with_settings("MCNetPlusTrainer", num_decoders=2)
    (linear,) = trainer.network.further_decoders
    assert linear.transpconvs[0][1].mode == "trilinear"
    values = trainer.train_step(next(trainer.dataloader_train))
    assert all(math.isfinite(float(value)) for value in values.values())


def test_further_decoders_are_as_deep_as_the_planned_one(started):
    def deeper(plans):
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["n_conv_per_stage_decoder"] = [2, 1]

    network = started("MCNetPlusTrainer", changes=deeper).network
    for decoder in (network.decoder, *network.further_decoders):
        assert [len(stage.convs) for stage in decoder.stages] == [2, 1]


def test_the_first_decoder_predicts(calm, next_batches):
    image = next_batches(calm)[0].image
    before = calm.network(image)[0].detach()
    with torch.no_grad():
        for parameter in calm.network.further_decoders.parameters():
            parameter.zero_()
        assert torch.equal(calm.network(image)[0], before)
        next(calm.network.decoder.parameters()).add_(1)
        assert not torch.equal(calm.network(image)[0], before)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_every_decoder_draws_its_own_dropout(rate, with_settings, next_batches):
    trainer, seen = with_settings("MCNetPlusTrainer", dropout=rate), []
    for decoder in (trainer.network.decoder, *trainer.network.further_decoders):
        decoder.transpconvs[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainer.network(next_batches(trainer)[0].image, every_decoder=True)
    equal = [torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert equal == [rate == 0] * 3


# ---------------------------------------------------------------------------------------------------------------- terms


def logits_per_decoder(trainer, batches):
    labeled, unlabeled = batches
    with torch.no_grad():
        return trainer.network(torch.cat([labeled.image, unlabeled.strong]), every_decoder=True)


def test_every_decoder_is_supervised_with_half_weight(calm, next_batches, terms_of):
    labeled, unlabeled = next_batches(calm)
    supervised = terms_of(calm, (labeled, unlabeled))["supervised"]
    outputs = logits_per_decoder(calm, (labeled, unlabeled))
    expected = sum(float(calm.supervised_loss(rows(output, slice(2)), labeled.target)) for output in outputs)
    assert float(supervised.value.detach()) == pytest.approx(expected, rel=1e-5)
    assert supervised.weight == 0.5


@pytest.mark.parametrize("number", [2, 3])
def test_both_consistencies_add_up_to_the_published_mean_over_all_patches(number, started, next_batches, terms_of):
    settings = {"dropout": 0.0, "ramp_fraction": 0.0, "consistency_weight": 2.0}
    training = {"seed": 0, "hyperparameters": settings, "unlabeled_batch_size": number}
    trainer = started("MCNetPlusTrainer", training=training)
    batches = next_batches(trainer)
    terms = terms_of(trainer, batches)
    p = [torch.softmax(output[0], dim=1) for output in logits_per_decoder(trainer, batches)]
    published = sum(
        float((p[i] - p[j] ** 10 / (p[j] ** 10).sum(1, keepdim=True)).square().mean())
        for i in range(3)
        for j in range(3)
        if i != j
    )
    found = sum(terms[name].weight * float(terms[name].value.detach()) for name in CONSISTENCIES)
    assert found == pytest.approx(2.0 * published, rel=1e-4)
    assert terms["labelled consistency"].weight == pytest.approx(2.0 * 2 / (2 + number))


def test_regions_are_sharpened_one_by_one(started, next_batches, values_of):
    settings = {"seed": 0, "hyperparameters": {"dropout": 0.0}}
    trainer = started("MCNetPlusTrainer", variant="regions", training=settings)
    batches = next_batches(trainer)
    logits = [output[0][2:] for output in logits_per_decoder(trainer, batches)]
    expected = float(mutual_consistency(logits, 0.1, True))
    assert values_of(trainer, batches)["consistency"] == pytest.approx(expected, rel=1e-4)


def test_the_consistencies_need_no_label(started, next_batches, values_of):
    trainer = started("MCNetPlusTrainer", variant="ignore")
    labeled, unlabeled = next_batches(trainer)
    ignore = trainer.label_manager.ignore_label
    blind = dataclasses.replace(labeled, target=[torch.full_like(scale, ignore) for scale in labeled.target])
    seen, unseen = (values_of(trainer, (batch, unlabeled)) for batch in (labeled, blind))
    assert all(seen[name] == unseen[name] for name in CONSISTENCIES)
    assert seen["supervised"] != unseen["supervised"]


@pytest.mark.parametrize("term", ["supervised", *CONSISTENCIES])
def test_every_term_trains_the_encoder_and_every_decoder(term, calm, next_batches, terms_of, reached):
    names = reached(terms_of(calm, next_batches(calm))[term].value, network=calm.network)
    assert parts(names) == {"encoder", "decoder", "further_decoders.0", "further_decoders.1"}


def test_each_consistency_has_patches_of_one_kind(calm, next_batches, terms_of):
    labeled, unlabeled = next_batches(calm)
    labeled.image.requires_grad_()
    unlabeled.strong.requires_grad_()
    for term, (of_labeled, of_unlabeled) in {"labelled consistency": (1, 0), "consistency": (0, 1)}.items():
        labeled.image.grad = unlabeled.strong.grad = None
        terms_of(calm, (labeled, unlabeled))[term].value.backward()
        assert (labeled.image.grad.abs().max() > 0) == bool(of_labeled)
        assert (unlabeled.strong.grad.abs().max() > 0) == bool(of_unlabeled)


def test_the_released_gradient_through_the_targets_is_an_option(with_settings, next_batches, terms_of):
    gradients, values = [], []
    for stop_gradient in (True, False):
        trainer = with_settings("MCNetPlusTrainer", stop_gradient=stop_gradient, dropout=0.0)
        term = terms_of(trainer, next_batches(trainer))["consistency"].value
        term.backward()
        values.append(float(term.detach()))
        gradients.append(next(trainer.network.decoder.parameters()).grad.clone())
    assert values[0] == values[1]
    assert not torch.allclose(*gradients, rtol=1e-2)


# -------------------------------------------------------------------------------------------------------------- options


def test_weights_of_the_consistencies_follow_the_ramp(with_settings, next_batches, terms_of):
    trainer = with_settings("MCNetPlusTrainer", consistency_weight=3.0, ramp_fraction=0.5, supervised_weight=0.25)
    batches, weights = next_batches(trainer), []
    for trainer.iteration in (0, 2):
        terms = terms_of(trainer, batches)
        weights.append([terms[name].weight for name in CONSISTENCIES])
        assert terms["supervised"].weight == 0.25
    assert weights == [pytest.approx([1.5 * math.exp(-5)] * 2), [1.5, 1.5]]


def test_the_temperature_is_that_of_the_sharpening(with_settings, next_batches, values_of):
    found = {}
    for temperature in (0.1, 1.0):
        trainer = with_settings("MCNetPlusTrainer", temperature=temperature, dropout=0.0)
        batches = next_batches(trainer)
        logits = [output[0][2:] for output in logits_per_decoder(trainer, batches)]
        found[temperature] = values_of(trainer, batches)["consistency"]
        assert found[temperature] == pytest.approx(float(mutual_consistency(logits, temperature, False)), rel=1e-4)
    assert found[0.1] > found[1.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_decoders", 1),
        ("num_decoders", 4),
        ("dropout", 1.0),
        ("supervised_weight", -1.0),
        ("consistency_weight", -1.0),
        ("ramp_fraction", 1.5),
        ("temperature", 0.0),
        ("temperature", 2.0),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name, value, build):
    with pytest.raises(UsageError, match=name):
        build("MCNetPlusTrainer", training={"seed": 0, "hyperparameters": {name: value}})
