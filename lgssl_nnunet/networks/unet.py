"""The plans' U-Net, and what methods need of it beyond a prediction: dropout and the features of its decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from lgssl_nnunet.errors import PlansError

if TYPE_CHECKING:
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

DROPOUTS = {2: nn.Dropout2d, 3: nn.Dropout3d}

Logits = torch.Tensor | list[torch.Tensor]


def planned_unet(
    configuration_manager: ConfigurationManager,
    num_input_channels: int,
    num_output_channels: int,
    deep_supervision: bool = True,
) -> nn.Module:
    """Build the plans' network, with the initialisation of stock nnU-Net.

    Args:
        configuration_manager: the configuration's architecture.
        num_input_channels: image channels M.
        num_output_channels: output channels C (classes with background, or regions).
        deep_supervision: whether the decoder returns lists of logits.

    Raises:
        PlansError: the architecture has no encoder and decoder of nnU-Net's kind.
    """
    network = get_network_from_plans(
        configuration_manager.network_arch_class_name,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
        num_input_channels,
        num_output_channels,
        allow_init=True,
        deep_supervision=deep_supervision,
    )
    if not isinstance(getattr(network, "decoder", None), UNetDecoder):
        name = configuration_manager.network_arch_class_name
        raise PlansError(
            f"The plans' network {name} is no U-Net with an nnU-Net decoder; plan with a default or ResEnc planner."
        )
    return network


def dropout_layer(network: nn.Module, rate: float) -> nn.Module:
    """Return channel dropout for the feature maps of a network with an `encoder` of nnU-Net's."""
    return DROPOUTS[convert_conv_op_to_dim(network.encoder.conv_op)](rate)


class Decoded(NamedTuple):
    """What `decode` found, features and skips with full resolution first.

    Attributes:
        logits: as the decoder itself returns them.
        features: of each decoder stage, (B, D_k, *S_k); the first after dropout.
        skips: as they were concatenated, (B, D_k, *S_k).
    """

    logits: Logits
    features: list[torch.Tensor]
    skips: list[torch.Tensor]


def decode(
    decoder: UNetDecoder,
    skips: Sequence[torch.Tensor],
    head_dropout: nn.Module | None = None,
    gates: Sequence[nn.Module] | None = None,
) -> Decoded:
    """Run nnU-Net's decoder and return what it computes on the way.

    Args:
        decoder: a decoder of nnU-Net's kind.
        skips: the encoder's outputs, full resolution first, the bottleneck last.
        head_dropout: applied to the full-resolution feature before its segmentation layer.
        gates: one per decoder stage, lowest resolution first: `gate(upsampled feature, skip)` replaces the skip.
    """
    x, features, used = skips[-1], [], []
    gates = gates if gates is not None else [None] * len(decoder.stages)
    for upsample, stage, skip, gate in zip(
        decoder.transpconvs, decoder.stages, reversed(skips[:-1]), gates, strict=True
    ):
        upsampled = upsample(x)
        used.insert(0, skip if gate is None else gate(upsampled, skip))
        x = stage(torch.cat((upsampled, used[0]), dim=1))
        features.insert(0, x)
    if head_dropout is not None:
        features[0] = head_dropout(features[0])
    heads = reversed(decoder.seg_layers)
    if not decoder.deep_supervision:
        return Decoded(next(iter(heads))(features[0]), features, used)
    return Decoded([head(feature) for head, feature in zip(heads, features, strict=True)], features, used)


class DropoutUNet(nn.Module):
    """The plans' U-Net with channel dropout on the bottleneck and before the full-resolution segmentation layer.

    nnU-Net plans no dropout, and Monte-Carlo passes measure it. It is drawn in training mode only; the keys of the
    weights are those of the plans' network.

    Args:
        network: a network built from the plans; its modules are taken over.
        dropout: rate.

    Source: the V-Net of UA-MT (2019) and its descendants; methods.md 1.2 and 1.4, R6.
    """

    def __init__(self, network: nn.Module, dropout: float) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.bottleneck_dropout = dropout_layer(network, dropout)
        self.head_dropout = dropout_layer(network, dropout)

    def forward(self, x: torch.Tensor, with_features: bool = False) -> Logits | tuple[Logits, list[torch.Tensor]]:
        """Predict.

        Args:
            x: images (B, M, *S).
            with_features: return the features of the decoder's stages as well, full resolution first.

        Returns:
            Logits (B, C, *S), with deep supervision a list of them, full resolution first.
        """
        skips = self.encoder(x)
        decoded = decode(self.decoder, [*skips[:-1], self.bottleneck_dropout(skips[-1])], self.head_dropout)
        return (decoded.logits, decoded.features) if with_features else decoded.logits
