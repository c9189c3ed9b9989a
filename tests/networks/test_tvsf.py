from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lgssl_nnunet.networks.tvsf import TextVisionSelectionFusion

SHAPES = [(2, 6, 3, 4, 5), (2, 6, 4, 5)]


def published(dimensions: int) -> TextVisionSelectionFusion:
    return TextVisionSelectionFusion(6, dimensions, affine_norm=False, gate_start=None)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_computes_the_published_formula(shape):
    fusion, v, tau = published(len(shape) - 2), torch.randn(shape), torch.randn(shape)

    def pointwise(convolution, feature):
        weight = convolution.weight.flatten(1)
        bias = convolution.bias.reshape(-1, *[1] * (len(shape) - 2))
        return torch.einsum("oi,bi...->bo...", weight, feature) + bias

    def standardise(feature):
        axes = tuple(range(2, feature.ndim))
        variance = feature.var(axes, unbiased=False, keepdim=True)
        return (feature - feature.mean(axes, keepdim=True)) / torch.sqrt(variance + 1e-5)

    def leaky(feature):
        return torch.where(feature > 0, feature, 0.01 * feature)

    a = leaky(standardise(pointwise(fusion.shared, v)) + standardise(pointwise(fusion.shared, tau)))
    s = torch.sigmoid(standardise(pointwise(fusion.select, a)))
    m = leaky(standardise(pointwise(fusion.merge, torch.cat([v, tau], 1))))
    fused, selection_map = fusion(v, tau)
    torch.testing.assert_close(selection_map, s, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused, m * s, rtol=1e-4, atol=1e-5)


def test_constant_features_give_half_a_gate_and_nothing_through_it():
    v, tau = torch.full((2, 6, 4, 4, 4), 0.7), torch.full((2, 6, 4, 4, 4), -1.3)
    fused, selection_map = published(3)(v, tau)
    torch.testing.assert_close(selection_map, torch.full_like(selection_map, 0.5), rtol=0, atol=1e-3)
    torch.testing.assert_close(fused, torch.zeros_like(fused), rtol=0, atol=1e-3)


def test_without_affine_parameters_the_logit_of_the_gate_has_mean_0_and_variance_1():
    shape = SHAPES[0]
    _, selection_map = published(3)(torch.randn(shape), torch.randn(shape))
    logit = torch.logit(selection_map.double()).flatten(1)
    torch.testing.assert_close(logit.mean(1), torch.zeros(2).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logit.var(1, unbiased=False), torch.ones(2).double(), rtol=0, atol=1e-3)


def test_with_affine_parameters_the_gate_can_open_as_a_whole():
    fusion = TextVisionSelectionFusion(6, 3)
    torch.nn.init.constant_(fusion.select_norm.bias, 5.0)
    _, selection_map = fusion(torch.randn(SHAPES[0]), torch.randn(SHAPES[0]))
    assert selection_map.mean() > 0.9


def test_the_residual_gate_starts_as_the_identity_and_learns():
    fusion, v = TextVisionSelectionFusion(6, 3), torch.randn(SHAPES[0])
    fused, _ = fusion(v, torch.randn(SHAPES[0]))
    assert torch.equal(fused, v)
    functional.mse_loss(fused, torch.zeros_like(fused)).backward()
    assert fusion.gamma.grad.abs() > 0


@pytest.mark.parametrize("gate_start", [0.0, 1.0, None])
def test_half_precision_goes_in_and_comes_out(gate_start):
    fusion = TextVisionSelectionFusion(6, 3, gate_start=gate_start)
    v, tau = torch.randn(SHAPES[0]), torch.randn(SHAPES[0])
    exact, _ = fusion(v, tau)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused, selection_map = fusion(v.bfloat16(), tau.bfloat16())
    assert (fused.dtype, selection_map.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(fused.float(), exact, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("affine", [True, False])
def test_a_single_voxel_bottleneck_skips_the_normalisation(affine):
    fusion = TextVisionSelectionFusion(6, 3, affine_norm=affine, gate_start=None).train()
    fused, selection_map = fusion(torch.randn(2, 6, 1, 1, 1), torch.randn(2, 6, 1, 1, 1))
    assert fused.shape == (2, 6, 1, 1, 1)
    assert not torch.equal(selection_map, torch.full_like(selection_map, 0.5))
    assert torch.isfinite(fused).all()
