from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lgssl_nnunet.networks.attention_gates import AttentionGate, AttentionGatedUNet
from lgssl_nnunet.networks.unet import decode, planned_unet


@pytest.fixture
def network(configuration_manager) -> AttentionGatedUNet:
    return AttentionGatedUNet(planned_unet(configuration_manager, 1, 3))


def image_for(configuration) -> torch.Tensor:
    return torch.randn(2, 1, *configuration.patch_size)


def open_gates(network: AttentionGatedUNet) -> None:
    """Make every gate let (almost) everything through."""
    for gate in network.gates:
        torch.nn.init.zeros_(gate.psi[2].weight)
        torch.nn.init.constant_(gate.psi[2].bias, 30.0)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_gate_is_additive_attention(dimensions):
    gate, shape = AttentionGate(6, dimensions), (4, 5, 6)[:dimensions]
    for norm in (gate.gating[1], gate.skip[1], gate.psi[2]):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    g, x = torch.randn(2, 6, *shape), torch.randn(2, 6, *shape)

    def normed(weight: torch.Tensor, norm: torch.nn.Module, feature: torch.Tensor) -> torch.Tensor:
        mixed = torch.einsum("oi,bi...->bo...", weight.flatten(1), feature)
        axes = tuple(range(2, mixed.ndim))
        centred = (mixed - mixed.mean(axes, keepdim=True)) / (mixed.var(axes, keepdim=True, correction=0) + 1e-5).sqrt()
        ones = [1] * dimensions
        return centred * norm.weight.view(1, -1, *ones) + norm.bias.view(1, -1, *ones)

    inner = functional.relu(
        normed(gate.gating[0].weight, gate.gating[1], g) + normed(gate.skip[0].weight, gate.skip[1], x)
    )
    expected = x * torch.sigmoid(normed(gate.psi[1].weight, gate.psi[2], inner))
    torch.testing.assert_close(gate(g, x), expected, rtol=1e-4, atol=1e-5)
    assert gate.gating[0].weight.shape[:2] == (3, 6)


def test_a_gate_of_one_channel_works():
    assert AttentionGate(1, 2)(torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)).shape == (1, 1, 4, 4)


def test_it_predicts_in_the_shapes_of_the_planned_network(network, stock_network, configuration_manager):
    stock, image = stock_network(configuration_manager), image_for(configuration_manager)
    assert [z.shape for z in network(image)] == [z.shape for z in stock(image)]
    network.decoder.deep_supervision = False
    assert network(image).shape == (2, 3, *configuration_manager.patch_size)


def test_weights_of_the_planned_network_fit_and_start_alike(configuration_manager):
    torch.manual_seed(3)
    stock = planned_unet(configuration_manager, 1, 3).state_dict()
    torch.manual_seed(3)
    gated = AttentionGatedUNet(planned_unet(configuration_manager, 1, 3)).state_dict()
    assert {name for name in gated if not name.startswith("gates.")} == set(stock)
    assert all(torch.equal(value, gated[name]) for name, value in stock.items())


def test_with_open_gates_it_is_the_planned_network(network, stock_network, configuration_manager):
    stock, image = stock_network(configuration_manager), image_for(configuration_manager)
    network.load_state_dict(stock.state_dict(), strict=False)
    assert not torch.allclose(network(image)[0], stock(image)[0], atol=1e-3)
    open_gates(network)
    for ours, theirs in zip(network(image), stock(image), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_skips_come_with_the_prediction_before_and_after_the_gates(network, configuration_manager):
    image = image_for(configuration_manager)
    logits, encoded, gated = network(image, with_skips=True)
    assert all(torch.equal(a, b) for a, b in zip(logits, network(image), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(encoded, network.encoder(image), strict=True))
    assert [skip.shape for skip in gated] == [skip.shape for skip in encoded[:-1]]
    for before, after in zip(encoded, gated, strict=False):
        share = (after / before)[before.abs() > 1e-3]
        assert share.min() > 0
        assert share.max() < 1
        # One share per voxel, whatever the channel.
        assert (after * before.sum(1, keepdim=True) - before * after.sum(1, keepdim=True)).abs().max() < 1e-3


def test_the_gating_signal_is_the_feature_that_the_decoder_upsampled(network, configuration_manager):
    seen = {}
    network.decoder.transpconvs[0].register_forward_hook(lambda module, inputs, output: seen.update(upsampled=output))
    network.gates[0].register_forward_hook(lambda module, inputs, output: seen.update(g=inputs[0], x=inputs[1]))
    _, encoded, _ = network(image_for(configuration_manager), with_skips=True)
    assert seen["g"] is seen["upsampled"]
    assert seen["x"] is encoded[-2]


def test_what_is_gated_is_what_the_decoder_reads(network, configuration_manager):
    seen = []
    network.decoder.stages[-1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, _, gated = network(image_for(configuration_manager), with_skips=True)
    assert torch.equal(seen[0][:, -gated[0].shape[1] :], gated[0])


def test_a_prediction_trains_every_gate(network, configuration_manager):
    network(image_for(configuration_manager))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.gates.parameters())


def test_decoding_without_gates_is_the_decoders_own_pass(stock_network, configuration_manager):
    network = stock_network(configuration_manager)
    skips = network.encoder(image_for(configuration_manager))
    decoded = decode(network.decoder, skips)
    assert all(torch.equal(a, b) for a, b in zip(decoded.logits, network.decoder(skips), strict=True))
    assert all(a is b for a, b in zip(decoded.skips, skips[:-1], strict=True))
    assert [feature.shape[2:] for feature in decoded.features] == [skip.shape[2:] for skip in skips[:-1]]
    network.decoder.deep_supervision = False
    assert torch.equal(decode(network.decoder, skips).logits, network.decoder(skips))
