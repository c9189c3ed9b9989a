"""-pretrained_weights: what of another training's checkpoint starts a network, and what is refused."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from lgssl_nnunet.engine.pretrained import load_pretrained
from lgssl_nnunet.errors import CheckpointError
from lgssl_nnunet.networks.ensemble import NetworkPair
from lgssl_nnunet.networks.families import as_plain, as_residual
from lgssl_nnunet.networks.language_guided import build_language_guided_unet
from lgssl_nnunet.training import _load_weights

CLASSES = 3
PLANS = SimpleNamespace(
    plans={"plans_name": "LGSSLPlans", "lgssl": {"text": {"embeddings": torch.eye(CLASSES, 12).tolist()}}}
)


@pytest.fixture
def configuration(make_configuration):
    def make(features: int = 4, kernel: int = 3) -> ConfigurationManager:
        kernels = [[kernel, kernel]] * 3
        return make_configuration((16, 16), ((1, 1), (2, 2), (2, 2)), kernels=kernels, features=features)

    return make


@pytest.fixture
def make_stock(stock_network, configuration):
    """nnU-Net's network in two dimensions."""

    def make(features: int = 4, channels: int = 1, kernel: int = 3) -> torch.nn.Module:
        return stock_network(configuration(features, kernel), channels, CLASSES)

    return make


@pytest.fixture
def checkpoint(tmp_path):
    def save(content) -> str:
        file = tmp_path / "checkpoint_final.pth"
        torch.save({"network_weights": content.state_dict()} if isinstance(content, torch.nn.Module) else content, file)
        return str(file)

    return save


@pytest.fixture
def language_guided(configuration):
    return build_language_guided_unet(PLANS, configuration(), 1, CLASSES)


def test_a_stock_checkpoint_fills_encoder_and_first_decoder_and_nothing_else(make_stock, checkpoint, language_guided):
    stock = make_stock()
    before = {name: tensor.clone() for name, tensor in language_guided.state_dict().items()}
    load_pretrained(language_guided, checkpoint(stock))
    source, after = stock.state_dict(), language_guided.state_dict()
    expected = {name for name in after if name in source and ".seg_layers." not in name}
    assert any(name.startswith("decoder.") for name in expected)
    assert {name for name in after if name.startswith("encoder.")} <= expected
    assert all(torch.equal(after[name], source[name]) for name in expected)
    assert all(torch.equal(after[name], before[name]) for name in after if name not in expected)


def test_a_language_guided_checkpoint_fills_everything_but_what_belongs_to_classes(
    configuration, checkpoint, language_guided
):
    other = build_language_guided_unet(PLANS, configuration(), 1, CLASSES)
    load_pretrained(language_guided, checkpoint(other))
    source = other.state_dict()
    for name, tensor in language_guided.state_dict().items():
        of_classes = (name.endswith("weight") and ".seg_layers." in name) or name == "prompts.learnable"
        assert torch.equal(tensor, source[name]) != of_classes


def test_a_stock_checkpoint_starts_both_of_two_equal_networks(make_stock, checkpoint):
    pair, stock = NetworkPair(make_stock(), make_stock()), make_stock()
    heads = {name: p.clone() for name, p in pair.named_parameters() if ".seg_layers." in name}
    load_pretrained(pair, checkpoint(stock))
    source = dict(stock.named_parameters())
    for name, tensor in pair.named_parameters():
        expected = heads.get(name, source[name.removeprefix("first.").removeprefix("second.")])
        assert torch.equal(tensor, expected), name


def test_of_two_families_a_stock_checkpoint_starts_the_one_that_it_fits(stock_network, configuration, checkpoint):
    families = as_plain(configuration()), as_residual(configuration())
    pair = NetworkPair(*(stock_network(family) for family in families))
    stock, before = stock_network(families[1]), {name: p.clone() for name, p in pair.named_parameters()}
    load_pretrained(pair, checkpoint(stock))
    source = {f"second.{name}": p for name, p in stock.named_parameters() if ".seg_layers." not in name}
    assert all(torch.equal(p, source.get(name, before[name])) for name, p in pair.named_parameters())


def test_a_pair_starts_from_a_pair_each_from_its_own(make_stock, checkpoint):
    pair, other = (NetworkPair(make_stock(), make_stock()) for _ in range(2))
    load_pretrained(pair, checkpoint(other))
    source = dict(other.named_parameters())
    assert all(
        torch.equal(p, source[name]) != (".seg_layers." in name) for name, p in pair.named_parameters() if p.ndim > 1
    )


def test_a_checkpoint_that_fits_neither_of_two_networks_is_refused(make_stock, checkpoint):
    with pytest.raises(CheckpointError, match="No convolution"):
        load_pretrained(NetworkPair(make_stock(), make_stock()), checkpoint(make_stock(features=8)))


def test_tensors_that_nnunet_lists_twice_are_counted_once(make_stock, checkpoint, caplog):
    network = make_stock()
    seg_layers = {id(p) for name, p in network.named_parameters() if ".seg_layers." in name}
    with caplog.at_level(logging.INFO):
        number = load_pretrained(network, checkpoint(make_stock()))
    assert number == sum(id(p) not in seg_layers for p in network.parameters())
    assert f"the network took {number} of {number} tensors" in caplog.text


def test_weights_of_another_shape_are_left_out_and_named(make_stock, checkpoint, language_guided, caplog):
    first = "encoder.stages.0.0.convs.0.conv.weight"
    before = language_guided.state_dict()[first].clone()
    load_pretrained(language_guided, checkpoint(make_stock(channels=2)))
    assert torch.equal(language_guided.state_dict()[first], before)
    assert first in caplog.text


@pytest.mark.parametrize("difference", [{"features": 6}, {"kernel": 1}])
def test_weights_of_which_no_convolution_fits_the_encoder_are_refused(
    make_stock, checkpoint, language_guided, difference
):
    before = {name: tensor.clone() for name, tensor in language_guided.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"No convolution .* fits the encoder"):
        load_pretrained(language_guided, checkpoint(make_stock(**difference)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in language_guided.state_dict().items())


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2]])
def test_a_file_without_network_weights_is_refused(checkpoint, language_guided, content):
    with pytest.raises(CheckpointError, match="no network_weights"):
        load_pretrained(language_guided, checkpoint(content))


def test_a_damaged_file_is_refused(tmp_path, language_guided):
    file = tmp_path / "checkpoint_final.pth"
    file.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pretrained(language_guided, file)


def test_training_initializes_the_network_before_it_takes_pretrained_weights(make_stock, checkpoint, language_guided):
    stock, called = make_stock(), []
    run = SimpleNamespace(initialize=lambda: called.append("initialize"), network=language_guided)
    _load_weights(run, continue_training=False, only_validate=False, pretrained_weights=checkpoint(stock))
    assert called == ["initialize"]
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(language_guided.state_dict()[key], stock.state_dict()[key])


# ------------------------------------------------------------------------------------------------------- companions


@pytest.fixture
def source(build_trainer):
    """A network of the tiny dataset's plans whose weights are all its own, also where others start with zeros."""
    trainer = build_trainer("SupervisedTrainer", training={"seed": 5})
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.normal_()
    return trainer.network


@pytest.fixture
def started_from(build_trainer, checkpoint):
    """A trainer of the tiny dataset that starts from a network or a whole checkpoint."""

    def start(name: str, content):
        trainer = build_trainer(name)
        weights = checkpoint(content)
        _load_weights(trainer, continue_training=False, only_validate=False, pretrained_weights=weights)
        return trainer

    return start


@pytest.mark.parametrize("name", ["CPSTrainer", "DeSCOTrainer"])
def test_a_second_network_starts_from_the_weights_of_a_single_one(name, source, started_from, caplog):
    with caplog.at_level(logging.INFO):
        trainer = started_from(name, source)
    weights, second = dict(source.named_parameters()), dict(trainer.parts["second_network"].named_parameters())
    assert second.keys() == weights.keys()
    assert all(torch.equal(p, weights[key]) != (".seg_layers." in key) for key, p in second.items())
    first = trainer.network.decoder.seg_layers[-1].weight
    assert not torch.equal(first, trainer.second.decoder.seg_layers[-1].weight)
    taken = sum(".seg_layers." not in key for key in weights)
    assert f"the network took {taken} of {taken} tensors" in caplog.text
    assert f"second_network took {taken} of {taken} tensors" in caplog.text


def test_an_auxiliary_network_takes_its_whole_encoder_also_the_stage_with_attention(source, started_from, caplog):
    with caplog.at_level(logging.INFO):
        trainer = started_from("CAMLTrainer", source)
    weights, own = list(source.encoder.parameters()), list(trainer.auxiliary.encoder.parameters())
    assert len(own) > len(weights)  # those of the attention
    assert sum(any(p.shape == q.shape and torch.equal(p, q) for q in weights) for p in own) == len(weights)
    assert "auxiliary_network took" in caplog.text
    assert "embedding_heads" not in caplog.text


def test_a_companion_takes_what_the_checkpoint_has_under_its_name(source, started_from):
    own = {key: tensor + 1 for key, tensor in source.state_dict().items()}
    content = {"network_weights": source.state_dict(), "lgssl": {"second_network": own, "terms": []}}
    trainer = started_from("CPSTrainer", content)
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(trainer.network.state_dict()[key], source.state_dict()[key])
    assert torch.equal(trainer.second.state_dict()[key], own[key])


def test_a_companion_that_nothing_fits_is_named(source, started_from, caplog):
    content = {"network_weights": source.state_dict(), "lgssl": {"second_network": {}}}
    trainer = started_from("CPSTrainer", content)
    assert "fits the encoder of second_network, which starts untrained" in caplog.text
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert not torch.equal(trainer.second.state_dict()[key], source.state_dict()[key])


def test_a_teacher_starts_as_its_student(source, started_from, same):
    trainer = started_from("MeanTeacherTrainer", source)
    assert same(trainer.teacher.network.state_dict(), trainer.network.state_dict())
    key = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(trainer.teacher.network.state_dict()[key], source.state_dict()[key])
    assert int(trainer.teacher.averaged.n_averaged) == 0
