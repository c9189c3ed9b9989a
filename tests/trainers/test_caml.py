"""What CAMLTrainer does in a step."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from lgssl_nnunet.engine.batches import rows
from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.losses.consistency import mutual_consistency
from lgssl_nnunet.losses.correlation import confident_agreements, omni_correlation

CALM = {"dropout": 0.0, "attention_dropout": 0.0, "ramp_fraction": 0.0}
FEW = {"memory_samples": 8, "memory_size": 16}


@pytest.fixture
def calm(with_settings):
    """A trainer without dropout, with a ramp that has ended and a small memory."""
    return with_settings("CAMLTrainer", **CALM, **FEW)


@pytest.fixture
def ready(calm):
    """The same after two steps, so that the memory holds something."""
    for _ in range(2):
        calm.train_step(next(calm.dataloader_train))
    return calm


def passes(trainer, batches):
    """Logits of all scales and full-resolution features, per network."""
    image = torch.cat([batches[0].image, batches[1].strong])
    both = [net(image, with_features=True) for net in (trainer.network, trainer.auxiliary)]
    return [logits for logits, _ in both], [features[0] for _, features in both]


def networks(trainer) -> dict[str, nn.Module]:
    return {"vanilla": trainer.network, "auxiliary": trainer.auxiliary, "heads": trainer.heads}


def remembered(trainer) -> torch.Tensor:
    return torch.cat([e for entry in trainer.memory.entries.values() for e in entry.values()])


# ------------------------------------------------------------------------------------------------------------- networks


def test_the_vanilla_network_is_the_planned_one_and_the_auxiliary_one_attends_and_interpolates(calm):
    assert {name.split(".")[0] for name in calm.network.state_dict()} == {"encoder", "decoder"}
    assert all(isinstance(step, nn.ConvTranspose3d) for step in calm.network.decoder.transpconvs)
    for convolution, upsample in calm.auxiliary.decoder.transpconvs:
        assert (convolution.kernel_size, upsample.mode) == ((1, 1, 1), "trilinear")
    attending = [
        any(isinstance(m, nn.TransformerEncoderLayer) for m in s.modules()) for s in calm.auxiliary.encoder.stages
    ]
    assert attending == [index == 1 for index in range(len(attending))]
    assert not set(calm.network.parameters()) & set(calm.auxiliary.parameters())


def test_the_auxiliary_encoder_starts_from_other_weights(calm):
    weights = [next(p for p in net.encoder.parameters() if p.ndim > 1) for net in (calm.network, calm.auxiliary)]
    assert not torch.equal(*weights)


def test_a_faithful_decoder_interpolates_first_and_then_convolves(with_settings):
    trainer = with_settings("CAMLTrainer", faithful_decoder=True)
    for upsample, convolution in trainer.auxiliary.decoder.transpconvs:
        assert upsample.align_corners
        assert convolution.conv.kernel_size == (3, 3, 3)
    trainer.train_step(next(trainer.dataloader_train))


def test_fewer_tokens_move_the_attention_to_a_lower_resolution(with_settings):
    trainer = with_settings("CAMLTrainer", attention_tokens=300)
    stages = trainer.auxiliary.encoder.stages
    attending = [i for i, s in enumerate(stages) if any(isinstance(m, nn.TransformerEncoderLayer) for m in s.modules())]
    assert attending == [2]


@pytest.mark.parametrize(("name", "kind"), [("dropout", nn.Dropout3d), ("attention_dropout", nn.Dropout)])
def test_dropout_rates_reach_their_layers(name, kind, with_settings):
    trainer = with_settings("CAMLTrainer", **{name: 0.25})
    rates = {m.p for m in [*trainer.network.modules(), *trainer.auxiliary.modules()] if type(m) is kind}
    assert rates == {0.25}


def test_the_auxiliary_network_sees_the_unlabelled_patches_while_it_sees_the_labelled_ones(calm, next_batches):
    labeled, unlabeled = next_batches(calm)
    other = dataclasses.replace(unlabeled, strong=torch.randn_like(unlabeled.strong))
    (vanilla, auxiliary), (same, moved) = (passes(calm, (labeled, u))[0] for u in (unlabeled, other))
    assert torch.equal(vanilla[0][:2], same[0][:2])
    assert (auxiliary[0][:2] - moved[0][:2]).abs().max() > 1e-4


# ---------------------------------------------------------------------------------------------------------------- terms


def test_both_networks_are_supervised_with_half_weight(calm, next_batches, terms_of):
    batches = next_batches(calm)
    terms = terms_of(calm, batches)
    for name, output in zip(("supervised", "supervised auxiliary"), passes(calm, batches)[0], strict=True):
        expected = float(calm.supervised_loss(rows(output, slice(2)), batches[0].target).detach())
        assert float(terms[name].value) == pytest.approx(expected, rel=1e-5)
        assert terms[name].weight == 0.5


def test_the_consistency_is_the_published_mean_over_all_patches(calm, next_batches, values_of):
    batches = next_batches(calm)
    p, q = (torch.softmax(output[0], dim=1) for output in passes(calm, batches)[0])
    sharp_p, sharp_q = (x**10 / (x**10).sum(1, keepdim=True) for x in (p, q))
    published = (p - sharp_q).square().mean() + (q - sharp_p).square().mean()
    assert values_of(calm, batches)["consistency"] == pytest.approx(float(published), rel=1e-4)


def test_the_released_gradient_through_the_sharpened_predictions_is_an_option(with_settings, next_batches, terms_of):
    gradients, values = [], []
    for stop_gradient in (True, False):
        trainer = with_settings("CAMLTrainer", stop_gradient=stop_gradient, **CALM)
        term = terms_of(trainer, next_batches(trainer))["consistency"].value
        term.backward()
        values.append(float(term))
        gradients.append(next(trainer.network.decoder.parameters()).grad.clone())
    assert values[0] == values[1]
    assert not torch.allclose(*gradients, rtol=1e-2)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_correlation_compares_predictions_of_unlabelled_voxels_with_projections_of_labelled_ones(
    similarity, with_settings, next_batches, values_of
):
    trainer = with_settings("CAMLTrainer", **CALM, memory_samples=8, memory_size=8, similarity=similarity)
    trainer.train_step(next(trainer.dataloader_train))
    trainer.memory.entries = {"only": dict(next(iter(trainer.memory.entries.values())))}
    batches = next_batches(trainer)
    outputs, features = passes(trainer, batches)
    queries = confident_agreements(*(output[0][2:] for output in outputs), most=12_800)
    assert len(queries) > 100
    embeddings = [
        predict(project(f[2:].movedim(1, -1).flatten(0, -2)[queries]))
        for predict, project, f in zip(trainer.heads.predictions, trainer.heads.projections, features, strict=True)
    ]
    # As many as there are in the only case: every draw is the whole memory, in another order.
    complete = torch.cat([e for e in trainer.memory.entries["only"].values() if len(e) == 8])
    expected = float(omni_correlation(*embeddings, complete, 0.1, similarity))
    assert expected > 0
    assert values_of(trainer, batches)["correlation"] == pytest.approx(expected, rel=1e-3)


def test_the_first_step_has_no_memory_and_no_correlation(calm, next_batches, values_of):
    assert values_of(calm, next_batches(calm))["correlation"] == 0


def test_every_term_reaches_the_networks_that_it_trains(ready, next_batches, terms_of, reached):
    terms = terms_of(ready, next_batches(ready))
    found = {name: {key.split(".")[0] for key in reached(t.value, **networks(ready))} for name, t in terms.items()}
    assert found == {
        "supervised": {"vanilla"},
        "supervised auxiliary": {"auxiliary"},
        "consistency": {"vanilla", "auxiliary"},
        "correlation": {"vanilla", "auxiliary", "heads"},
    }


def test_attention_and_every_head_are_trained(ready, next_batches, terms_of, reached):
    names = reached(ready.total(terms_of(ready, next_batches(ready))), **networks(ready))
    for part in ("within", "across"):
        assert any(f".{part}.self_attn.in_proj_weight" in name for name in names)
    assert {name for name in names if name.startswith("heads.") and name.endswith(".3.weight")} == {
        f"heads.{kind}.{network}.3.weight" for kind in ("projections", "predictions") for network in (0, 1)
    }


def test_each_trained_part_is_clipped_by_itself(calm):
    groups = [{id(p) for p in group["params"]} for group in calm.optimizer.param_groups]
    assert groups == [{id(p) for p in net.parameters()} for net in networks(calm).values()]


def test_the_correlation_has_a_gradient_in_unlabelled_patches_and_none_in_the_memory(ready, next_batches, terms_of):
    labeled, unlabeled = next_batches(ready)
    unlabeled.strong.requires_grad_()
    terms_of(ready, (labeled, unlabeled))["correlation"].value.backward()
    assert unlabeled.strong.grad.abs().max() > 0
    assert not remembered(ready).requires_grad


def test_labels_enter_neither_the_consistency_nor_the_correlation_of_their_step(ready, next_batches, values_of):
    labeled, unlabeled = next_batches(ready)
    empty = dataclasses.replace(labeled, target=[torch.zeros_like(scale) for scale in labeled.target])
    seen, unseen = (values_of(ready, (batch, unlabeled)) for batch in (labeled, empty))
    assert all(seen[name] == unseen[name] for name in ("consistency", "correlation"))
    assert all(seen[name] != unseen[name] for name in ("supervised", "supervised auxiliary"))


# --------------------------------------------------------------------------------------------------------------- memory


def test_the_memory_changes_after_the_step_and_not_within_it(calm, next_batches, terms_of):
    terms_of(calm, next_batches(calm))
    assert calm.memory.entries == {}
    batch = next(calm.dataloader_train)
    calm.train_step(batch)
    assert set(calm.memory.entries) == set(batch["keys"])


def test_what_is_remembered_are_mean_projections_of_voxels_that_both_networks_classify_correctly(calm, next_batches):
    labeled, unlabeled = next_batches(calm)
    labeled = dataclasses.replace(labeled, keys=("a", "b"))
    outputs, features = passes(calm, (labeled, unlabeled))
    voxels = [f[:2].movedim(1, -1) for f in features]
    projected = torch.stack([p(v) for p, v in zip(calm.heads.projections, voxels, strict=True)]).mean(dim=0)
    first, second = (output[0][:2].argmax(dim=1) for output in outputs)
    label = labeled.target[0][:, 0]
    correct = (first == label) & (second == label)
    found = calm._correct_voxels(labeled, [output[0] for output in outputs], features)
    assert list(found) == ["a", "b"]
    for row, (embeddings, classes) in enumerate(found.values()):
        available = [int((correct[row] & (label[row] == c)).sum()) for c in range(3)]
        assert [int((classes == c).sum()) for c in range(3)] == [min(16, count) for count in available]
        for c in range(3):
            candidates = projected[row][correct[row] & (label[row] == c)]
            for embedding in embeddings[classes == c]:
                assert (candidates - embedding).abs().amax(dim=1).min() < 1e-5


def test_patches_of_one_case_share_its_entry(calm, next_batches):
    labeled, unlabeled = next_batches(calm)
    outputs, features = passes(calm, (labeled, unlabeled))
    logits = [output[0] for output in outputs]
    twice = calm._correct_voxels(dataclasses.replace(labeled, keys=("a", "a")), logits, features)
    apart = calm._correct_voxels(dataclasses.replace(labeled, keys=("a", "b")), logits, features)
    counts = [torch.bincount(classes, minlength=3) for _, classes in apart.values()]
    assert list(twice) == ["a"]
    assert torch.equal(torch.bincount(twice["a"][1], minlength=3), sum(counts).clamp(max=16))


def test_voxels_to_be_ignored_are_not_remembered(started, next_batches):
    trainer = started("CAMLTrainer", variant="ignore", training={"seed": 0, "hyperparameters": {**CALM, **FEW}})
    labeled, unlabeled = next_batches(trainer)
    ignore = torch.full_like(labeled.target[0], trainer.label_manager.ignore_label)
    blind = dataclasses.replace(labeled, target=[ignore, *labeled.target[1:]])
    for batch, empty in ((labeled, False), (blind, True)):
        outputs, features = passes(trainer, (batch, unlabeled))
        found = trainer._correct_voxels(batch, [output[0] for output in outputs], features)
        assert (sum(len(classes) for _, classes in found.values()) == 0) == empty


def test_the_checkpoint_holds_both_companions_and_the_memory(ready, same, tmp_path):
    ready.save_checkpoint(tmp_path / "checkpoint.pth")
    stored = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert same(stored["network_weights"], ready.network.state_dict())
    assert same(stored["lgssl"]["auxiliary_network"], ready.auxiliary.state_dict())
    assert same(stored["lgssl"]["embedding_heads"], ready.heads.state_dict())
    assert same(stored["lgssl"]["memory"], ready.memory.state_dict())
    assert stored["lgssl"]["memory"]


# -------------------------------------------------------------------------------------------------------------- options


def test_a_single_patch_of_each_kind_is_enough(started):
    def single(plans):
        plans["configurations"]["3d_fullres"]["batch_size"] = 1

    trainer = started("CAMLTrainer", changes=single)
    for _ in range(2):
        values = trainer.train_step(next(trainer.dataloader_train))
        assert all(math.isfinite(float(value)) for value in values.values())


def test_weights_follow_the_ramp(with_settings, next_batches, terms_of):
    weights = {"supervised_weight": 0.25, "consistency_weight": 3.0, "correlation_weight": 2.0}
    trainer = with_settings("CAMLTrainer", ramp_fraction=0.5, **weights)
    batches, found = next_batches(trainer), []
    for trainer.iteration in (0, 2):
        found.append([term.weight for term in terms_of(trainer, batches).values()])
    assert found == [pytest.approx([0.25, 0.25, 3 * math.exp(-5), 2 * math.exp(-5)]), [0.25, 0.25, 3.0, 2.0]]


def test_the_temperature_is_that_of_the_sharpening(with_settings, next_batches, values_of):
    found = {}
    for temperature in (0.1, 1.0):
        trainer = with_settings("CAMLTrainer", temperature=temperature, **CALM)
        batches = next_batches(trainer)
        logits = [output[0] for output in passes(trainer, batches)[0]]
        found[temperature] = values_of(trainer, batches)["consistency"]
        assert found[temperature] == pytest.approx(float(mutual_consistency(logits, temperature, False)), rel=1e-4)
    assert found[0.1] > found[1.0]


def test_the_temperature_of_the_correlation_makes_it_flat(with_settings, next_batches, values_of):
    found = []
    for temperature in (0.1, 1e6):
        trainer = with_settings("CAMLTrainer", correlation_temperature=temperature, **CALM, **FEW)
        trainer.train_step(next(trainer.dataloader_train))
        found.append(values_of(trainer, next_batches(trainer))["correlation"])
        entries = len(trainer.memory.sample(8))
    assert found[1] == pytest.approx(math.log(entries), rel=1e-4)
    assert abs(found[0] - found[1]) > 1e-3


def test_sizes_of_embeddings_memory_and_draws_are_settings(with_settings):
    trainer = with_settings("CAMLTrainer", embedding_size=6, memory_size=5, memory_samples=3)
    trainer.train_step(next(trainer.dataloader_train))
    kept = [e for entry in trainer.memory.entries.values() for e in entry.values()]
    assert max(len(e) for e in kept) == 5
    assert {e.shape[1] for e in kept} == {6}
    seen, sample = [], trainer.memory.sample
    trainer.memory.sample = lambda count: seen.append(count) or sample(count)
    trainer.train_step(next(trainer.dataloader_train))
    assert seen == [3]


@pytest.mark.parametrize(("variant", "classes"), [("standard", 3), ("two_classes", 2)])
def test_the_queries_of_a_class_shrink_with_the_number_of_classes(variant, classes, started, next_batches, terms_of):
    trainer = started("CAMLTrainer", variant=variant, training={"seed": 0, "hyperparameters": {"max_queries": 6}})
    seen = []
    trainer.heads.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    terms_of(trainer, next_batches(trainer))
    ((features, positions),) = seen
    logits = [
        net.decoder.seg_layers[-1](f) for net, f in zip((trainer.network, trainer.auxiliary), features, strict=True)
    ]
    agreed = logits[0].argmax(1).flatten()[positions]
    assert torch.equal(agreed, logits[1].argmax(1).flatten()[positions])
    assert int(torch.bincount(agreed).max()) == 12 // classes


def test_regions_are_refused_before_anything_is_written(build, tmp_path):
    with pytest.raises(UsageError, match="CAMLTrainer needs one class per voxel"):
        build("CAMLTrainer", variant="regions", results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_limit_that_no_stage_keeps_is_refused_before_anything_is_written(build, tmp_path):
    training = {"seed": 0, "hyperparameters": {"attention_tokens": 1}}
    with pytest.raises(PlansError, match="raise attention_tokens"):
        build("CAMLTrainer", training=training, results=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "fold", "message"),
    [
        ({"memory_size": 1, "memory_samples": 7}, "all", r"6 training cases the memory holds 6 "),
        ({"memory_size": 1, "memory_samples": 6}, 4, r"5 training cases the memory holds 5 "),
        ({"max_queries": 1}, "all", "no voxel for each of 3 classes"),
    ],
)
def test_sizes_that_leave_no_correlation_are_refused_before_anything_is_written(values, fold, message, build, tmp_path):
    with pytest.raises(UsageError, match=message):
        build("CAMLTrainer", training={"seed": 0, "hyperparameters": values}, fold=fold, results=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("supervised_weight", -1.0),
        ("consistency_weight", -1.0),
        ("correlation_weight", -1.0),
        ("ramp_fraction", 1.5),
        ("temperature", 0.0),
        ("similarity", "euclidean"),
        ("correlation_temperature", 0.0),
        ("embedding_size", 0),
        ("memory_size", 0),
        ("memory_samples", 0),
        ("max_queries", 0),
        ("attention_tokens", 0),
        ("attention_dropout", 1.0),
        ("dropout", 1.0),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name, value, build):
    with pytest.raises(UsageError, match=name):
        build("CAMLTrainer", training={"seed": 0, "hyperparameters": {name: value}})
