"""Attention within a sample and across the samples of a batch, at one stage of an encoder."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lgssl_nnunet.errors import PlansError

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

HEADS = 4
EXPANSION = 4


class CrossSampleAttention(nn.Module):
    """Cross-sample mutual attention: two transformer layers, in training only.

    The tokens of the first layer are the positions of a sample, those of the second the samples of the batch at the
    same position, so that what is labelled and what is not must be in one batch. In evaluation mode, where a prediction
    must not depend on what else is predicted, the feature passes unchanged.

    Args:
        channels: D; heads are 4, or 2 or 1 where 4 does not divide it.
        dropout: rate within the layers.

    Source: CAML (2023); methods.md section 8.
    """

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        heads = math.gcd(HEADS, channels)
        self.within, self.across = (
            nn.TransformerEncoderLayer(channels, heads, EXPANSION * channels, dropout, batch_first=True)
            for _ in range(2)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Return the attended feature, (B, D, *S) like the given one."""
        if not self.training:
            return feature
        tokens = self.within(feature.flatten(2).transpose(1, 2))
        tokens = self.across(tokens.transpose(0, 1)).transpose(0, 1)
        attended = tokens.transpose(1, 2).unflatten(2, feature.shape[2:])
        # Layout and type of the given feature, which later layers would otherwise take over from the tokens.
        return torch.empty_like(feature).copy_(attended)


def attention_stage(configuration_manager: ConfigurationManager, max_tokens: int) -> int:
    """Return the finest stage of the encoder, below full resolution, that has at most `max_tokens` positions.

    Args:
        configuration_manager: the configuration's patch size and strides.
        max_tokens: the cost of attention grows with the square of the positions.

    Raises:
        PlansError: there is none.
    """
    patch_size, strides = configuration_manager.patch_size, configuration_manager.network_arch_init_kwargs["strides"]
    sizes = itertools.accumulate(
        strides, lambda size, stride: [-(-n // s) for n, s in zip(size, stride, strict=True)], initial=patch_size
    )
    tokens = [math.prod(size) for size in sizes][1:]
    for stage, count in enumerate(tokens):
        if count <= max_tokens and count < math.prod(patch_size):
            return stage
    raise PlansError(
        f"No stage of the network has at most {max_tokens} positions to attend to (the lowest resolution has "
        f"{tokens[-1]}): raise attention_tokens with --set."
    )


def attend_after(encoder: nn.Module, stage: int, dropout: float) -> None:
    """Put cross-sample attention behind a stage of nnU-Net's encoder; its skip and the next stage read the result."""
    attention = CrossSampleAttention(encoder.output_channels[stage], dropout)
    encoder.stages[stage] = nn.Sequential(encoder.stages[stage], attention)
