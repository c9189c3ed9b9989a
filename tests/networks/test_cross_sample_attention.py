from __future__ import annotations

import pytest
import torch
from torch import nn

from lgssl_nnunet.errors import PlansError
from lgssl_nnunet.networks.cross_sample_attention import CrossSampleAttention, attend_after, attention_stage

EVERY_STAGE_HALVES_3D = ((1, 1, 1), *[(2, 2, 2)] * 5)


def attended(feature: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """What a transformer layer makes of tokens (sequence, D)."""
    return layer(feature[None])[0]


@pytest.fixture
def attention():
    return CrossSampleAttention(8, dropout=0.0)


@pytest.mark.parametrize("shape", [(3, 8, 2, 3, 4), (3, 8, 4, 2)])
def test_the_first_layer_attends_within_a_sample_and_the_second_across_samples(shape, attention):
    feature = torch.randn(shape)
    expected = torch.stack([attended(sample.flatten(1).T, attention.within) for sample in feature])
    expected = torch.stack([attended(expected[:, i], attention.across) for i in range(expected.shape[1])], dim=1)
    result = attention(feature)
    assert result.shape == shape
    torch.testing.assert_close(result.flatten(2).transpose(1, 2), expected)


def test_a_sample_changes_with_the_others_of_its_batch(attention):
    feature = torch.randn(2, 8, 4, 4)
    other = torch.cat([feature[:1], torch.randn(1, 8, 4, 4)])
    assert (attention(feature)[0] - attention(other)[0]).abs().max() > 1e-3


def test_a_single_sample_gets_a_layer_per_position(attention):
    """Attention over one token is its value, so only linear maps and normalisations remain."""
    feature = torch.randn(1, 8, 2, 2)
    tokens = attended(feature[0].flatten(1).T, attention.within)
    across = attention.across
    value = tokens @ across.self_attn.in_proj_weight[16:].T + across.self_attn.in_proj_bias[16:]
    x = across.norm1(tokens + across.self_attn.out_proj(value))
    expected = across.norm2(x + across.linear2(torch.relu(across.linear1(x))))
    torch.testing.assert_close(attention(feature)[0].flatten(1).T, expected)


def test_layers_are_the_published_ones():
    attention = CrossSampleAttention(32, dropout=0.5)
    for layer in (attention.within, attention.across):
        assert layer.self_attn.num_heads == 4
        assert layer.linear1.out_features == 128
        assert not layer.norm_first
        assert layer.activation_relu_or_gelu == 1
        dropouts = [layer.dropout.p, layer.dropout1.p, layer.dropout2.p, layer.self_attn.dropout]
        assert dropouts == [0.5] * 4


@pytest.mark.parametrize(("channels", "heads"), [(4, 4), (8, 4), (320, 4), (30, 2), (15, 1)])
def test_heads_divide_the_channels(channels, heads):
    attention = CrossSampleAttention(channels, dropout=0.0)
    assert attention.within.self_attn.num_heads == heads
    assert attention(torch.randn(2, channels, 2, 2)).shape == (2, channels, 2, 2)


def test_prediction_passes_it_by(attention):
    feature = torch.randn(2, 8, 4, 4)
    assert attention.eval()(feature) is feature
    assert not torch.equal(attention.train()(feature), feature)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_layout_and_type_of_the_feature_stay(memory_format, attention):
    feature = torch.randn(2, 8, 2, 3, 4, dtype=torch.bfloat16).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention(feature)
    assert result.is_contiguous(memory_format=memory_format)
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    assert attention.within.linear1.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("patch", "strides", "max_tokens", "stage"),
    [
        ((128, 128, 128), EVERY_STAGE_HALVES_3D, 4096, 3),
        ((112, 112, 80), EVERY_STAGE_HALVES_3D, 4096, 3),
        ((40, 56, 40), EVERY_STAGE_HALVES_3D[:4], 4096, 2),
        ((40, 56, 40), EVERY_STAGE_HALVES_3D[:4], 1000, 3),
        ((512, 512), ((1, 1), *[(2, 2)] * 7), 4096, 3),
        ((16, 16, 16), EVERY_STAGE_HALVES_3D[:3], 4096, 1),
        ((20, 256, 256), ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)), 4096, 4),
        ((9, 9, 9), EVERY_STAGE_HALVES_3D[:3], 125, 1),
    ],
)
def test_attention_is_at_the_finest_stage_below_full_resolution_that_it_can_afford(
    patch, strides, max_tokens, stage, make_configuration
):
    assert attention_stage(make_configuration(patch, strides), max_tokens) == stage


def test_a_network_without_such_a_stage_is_refused(configuration_3d):
    with pytest.raises(PlansError, match=r"at most 63 positions .* has 64\): raise attention_tokens"):
        attention_stage(configuration_3d, 63)
    assert attention_stage(configuration_3d, 64) == 2


def test_an_encoder_hands_the_attended_feature_to_the_skip_and_to_the_next_stage(stock_network, configuration_manager):
    torch.manual_seed(0)
    encoder = stock_network(configuration_manager).encoder
    image = torch.randn(2, 1, *configuration_manager.patch_size)
    plain = encoder(image)
    attend_after(encoder, 1, dropout=0.0)
    attention = encoder.stages[1][1]
    with_attention = encoder(image)
    torch.testing.assert_close(with_attention[0], plain[0])
    torch.testing.assert_close(with_attention[1], attention(plain[1]))
    torch.testing.assert_close(with_attention[2], encoder.stages[2](attention(plain[1])))
    assert all(torch.equal(a, b) for a, b in zip(encoder.eval()(image), plain, strict=True))
