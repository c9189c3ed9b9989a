from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.networks.decoders import interpolating_decoder, interpolating_twin


@pytest.mark.parametrize("faithful", [False, True])
def test_the_decoder_gives_the_shapes_of_nnunets_own(stock_network, configuration_manager, faithful):
    network = stock_network(configuration_manager)
    decoder = interpolating_decoder(network.encoder, 3, 1, True, faithful)
    image = torch.randn(2, 1, *configuration_manager.patch_size)
    skips = network.encoder(image)
    assert [output.shape for output in decoder(skips)] == [output.shape for output in network.decoder(skips)]
    decoder.deep_supervision = False
    assert decoder(skips).shape == (2, 3, *configuration_manager.patch_size)


def test_building_it_leaves_the_encoder_and_its_keys_alone(stock_network, configuration_3d):
    network = stock_network(configuration_3d)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    decoder = interpolating_decoder(network.encoder, 3, 1, True)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(name.startswith("encoder") for name in decoder.state_dict())
    assert network.decoder.encoder is network.encoder


def test_weights_are_drawn_like_nnunets(stock_network, configuration_3d):
    network = stock_network(configuration_3d)
    decoder = interpolating_decoder(network.encoder, 3, 1, True)
    weight = decoder.transpconvs[0][0].weight
    fan_in = weight[0].numel()
    assert weight.std().item() == pytest.approx((2 / (1 + 1e-4) / fan_in) ** 0.5, rel=0.2)
    assert all((parameter == 0).all() for name, parameter in decoder.named_parameters() if name.endswith("conv.bias"))


def test_convolving_before_or_after_interpolating_is_the_same(stock_network, configuration_manager):
    network = stock_network(configuration_manager)
    convolution, upsample = interpolating_decoder(network.encoder, 3, 1, True).transpconvs[0]
    torch.nn.init.normal_(convolution.bias)
    bottleneck = network.encoder(torch.randn(1, 1, *configuration_manager.patch_size))[-1]
    torch.testing.assert_close(upsample(convolution(bottleneck)), convolution(upsample(bottleneck)))


def test_the_default_upsampling_is_the_same_at_every_position(stock_network, configuration_3d):
    network = stock_network(configuration_3d)
    step = interpolating_decoder(network.encoder, 3, 1, True).transpconvs[0]
    feature = torch.randn(1, 16, 8, 8, 8)
    inner = step(feature[:, :, 2:7, 2:7, 2:7])[:, :, 2:-2, 2:-2, 2:-2]
    torch.testing.assert_close(inner, step(feature)[:, :, 6:12, 6:12, 6:12])
    torch.testing.assert_close(step(feature.flip(2)), step(feature).flip(2))


def test_a_twin_is_as_deep_as_the_planned_decoder_and_reads_the_same_skips(stock_network, make_configuration):
    configuration = make_configuration()
    configuration.configuration["architecture"]["arch_kwargs"]["n_conv_per_stage_decoder"] = [2, 1]
    network = stock_network(configuration, classes=2, deep_supervision=False)
    twin = interpolating_twin(network, faithful=True)
    assert [len(stage.convs) for stage in twin.stages] == [2, 1]
    assert twin.transpconvs[0][0].align_corners
    assert twin(network.encoder(torch.randn(1, 1, 16, 16, 16))).shape == (1, 2, 16, 16, 16)
    assert interpolating_twin(network, nearest=True).transpconvs[0][1].mode == "nearest"
