"""Several decoders on one encoder: nnU-Net's own, and decoders that upsample by interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from lgssl_nnunet.networks.unet import Logits, dropout_layer

LEAKY_SLOPE = 1e-2
LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def interpolating_decoder(
    encoder: PlainConvEncoder | ResidualEncoder,
    num_classes: int,
    n_conv_per_stage: int | Sequence[int],
    deep_supervision: bool,
    faithful: bool = False,
    nearest: bool = False,
) -> UNetDecoder:
    """Build an nnU-Net decoder whose transposed convolutions are replaced by interpolation.

    By default each step is a 1x1x1 convolution to the target width, then (bi/tri)linear interpolation by the stage's
    stride per axis. Both are linear and the interpolation weights sum to one, so their order does not matter to the
    result; convolving first is cheaper by the product of the strides. `align_corners` is False: the weights are then
    the same at every position and for every patch size, and the step commutes with mirroring.

    The faithful form is the published one: interpolation with `align_corners=True`, then a convolution with the
    stage's kernel, normalisation and nonlinearity, at 1.6 times the cost of a transposed-convolution decoder.

    The decoder keeps no reference to the encoder (unlike nnU-Net's), so its parameters and state_dict keys are its own.
    Its `compute_conv_feature_map_size` is therefore not usable.

    Args:
        encoder: the encoder whose skips the decoder reads, from the plans.
        num_classes: output channels C.
        n_conv_per_stage: convolutions per decoder stage, lowest resolution first, as in nnU-Net.
        deep_supervision: whether forward returns a list of logits, full resolution first.
        faithful: the published upsampling instead of the cheap one.
        nearest: nearest-neighbour instead of linear interpolation.

    Returns:
        A decoder, initialised like nnU-Net's networks; `forward(skips)` gives logits `(B, C, X, Y, Z)` or their list.

    Source: decoder 2 of LG-SSL (2025), decoders 2 (linear) and 3 (nearest) of MC-Net+ (2022); methods.md 2.3, 2.7 #16
    and section 4.
    """
    decoder = UNetDecoder(encoder, num_classes, n_conv_per_stage, deep_supervision)
    # The reference is only used for size estimates. It has to go before the initialisation, which would reach through
    # it and redraw the encoder's weights.
    del decoder.encoder
    decoder.transpconvs = nn.ModuleList(
        _upsampling_step(encoder, stage, faithful, nearest) for stage in range(1, len(encoder.output_channels))
    )
    decoder.apply(InitWeights_He(LEAKY_SLOPE))
    return decoder


def interpolating_twin(network: nn.Module, faithful: bool = False, nearest: bool = False) -> UNetDecoder:
    """Return an interpolating decoder as deep as the decoder of a planned network, for the skips of its encoder.

    Args:
        network: with `encoder` and `decoder` of nnU-Net's kind.
        faithful: see `interpolating_decoder`.
        nearest: see `interpolating_decoder`.
    """
    planned = network.decoder
    depths = [len(stage.convs) for stage in planned.stages]
    return interpolating_decoder(
        network.encoder, planned.num_classes, depths, planned.deep_supervision, faithful, nearest
    )


def _upsampling_step(
    encoder: PlainConvEncoder | ResidualEncoder, stage: int, faithful: bool, nearest: bool
) -> nn.Sequential:
    """Replace the transposed convolution of decoder stage `stage` (1 = the one that reads the bottleneck)."""
    channels_below, channels = encoder.output_channels[-stage], encoder.output_channels[-(stage + 1)]
    upsample = nn.Upsample(
        scale_factor=tuple(float(stride) for stride in encoder.strides[-stage]),
        mode="nearest" if nearest else LINEAR_MODES[convert_conv_op_to_dim(encoder.conv_op)],
        align_corners=None if nearest else faithful,
    )
    if not faithful:
        return nn.Sequential(encoder.conv_op(channels_below, channels, 1, bias=encoder.conv_bias), upsample)
    convolution = ConvDropoutNormReLU(
        encoder.conv_op,
        channels_below,
        channels,
        encoder.kernel_sizes[-(stage + 1)],
        1,
        encoder.conv_bias,
        encoder.norm_op,
        encoder.norm_op_kwargs,
        encoder.dropout_op,
        encoder.dropout_op_kwargs,
        encoder.nonlin,
        encoder.nonlin_kwargs,
    )
    return nn.Sequential(upsample, convolution)


class MultiDecoderUNet(nn.Module):
    """One encoder and several decoders, each with its own draw of dropout on the bottleneck.

    Encoder and first decoder are those of the plans' network and keep their keys (`encoder.*`, `decoder.*`), so a stock
    checkpoint's weights fit them. Called with an image alone, the first decoder predicts.

    Args:
        network: a network built from the plans, with `.encoder` and `.decoder`; its modules are taken over.
        further: more decoders on the same skips, see `interpolating_decoder`.
        dropout: rate of channel dropout on the bottleneck, in training only.

    Source: MC-Net+ (2022); methods.md section 4.
    """

    def __init__(self, network: nn.Module, further: Sequence[UNetDecoder], dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.further_decoders = nn.ModuleList(further)
        self.dropout = dropout_layer(network, dropout)

    def forward(self, x: torch.Tensor, every_decoder: bool = False) -> Logits | list[Logits]:
        """Predict, or run every decoder for a training step.

        Args:
            x: images (B, M, *S).
            every_decoder: return the logits of all decoders, the predicting one first.

        Returns:
            Logits (B, C, *S), with deep supervision a list of them, full resolution first; with `every_decoder` a list
            of that, one per decoder.
        """
        skips = self.encoder(x)
        if not every_decoder:
            return self.decoder(self.perturb(skips))
        return [decoder(self.perturb(skips)) for decoder in (self.decoder, *self.further_decoders)]

    def perturb(self, skips: list[torch.Tensor]) -> list[torch.Tensor]:
        """Draw dropout on the bottleneck anew, leaving the other skips alone."""
        return [*skips[:-1], self.dropout(skips[-1])]

    def set_deep_supervision(self, enabled: bool) -> None:
        """Switch deep supervision of every decoder."""
        for decoder in (self.decoder, *self.further_decoders):
            decoder.deep_supervision = enabled
