from __future__ import annotations

import pytest
import torch
from torch import nn

from lgssl_nnunet.networks.embedding import EmbeddingHeads


@pytest.fixture
def heads():
    return EmbeddingHeads(2, 5, 32)


def test_a_projection_and_a_prediction_are_linear_layernorm_relu_linear(heads):
    for part, channels in ((heads.projections, 5), (heads.predictions, 32)):
        assert len(part) == 2
        for layers in part:
            assert [type(layer) for layer in layers] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
            assert (layers[0].in_features, layers[-1].out_features) == (channels, 32)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_only_the_features_at_the_positions_are_embedded(heads, memory_format):
    features = [torch.randn(3, 5, 4, 6).contiguous(memory_format=memory_format) for _ in range(2)]
    positions = torch.tensor([0, 7, 24 + 13, 48 + 23])
    voxels = [torch.stack([f[0, :, 0, 0], f[0, :, 1, 1], f[1, :, 2, 1], f[2, :, 3, 5]]) for f in features]
    projected = [project(v) for project, v in zip(heads.projections, voxels, strict=True)]
    torch.testing.assert_close(heads.project(features, positions), (projected[0] + projected[1]) / 2)
    for found, predict, p in zip(heads(features, positions), heads.predictions, projected, strict=True):
        torch.testing.assert_close(found, predict(p))


def test_no_position_gives_no_embedding(heads):
    features, nowhere = [torch.randn(1, 5, 2, 2)] * 2, torch.zeros(0, dtype=torch.long)
    assert heads.project(features, nowhere).shape == (0, 32)
    assert [e.shape for e in heads(features, nowhere)] == [(0, 32)] * 2


def test_embeddings_are_fp32_whatever_the_network_computes_in(heads):
    features, positions = [torch.randn(1, 5, 2, 2, dtype=torch.bfloat16)] * 2, torch.tensor([1, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads.project(features, positions).dtype == torch.float32
        assert [e.dtype for e in heads(features, positions)] == [torch.float32] * 2
        inside = heads(features, positions)
    assert torch.equal(inside[0], heads(features, positions)[0])
