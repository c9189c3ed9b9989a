"""A U-Net decoder that upsamples by interpolation, to stand beside nnU-Net's own on the same encoder."""

from __future__ import annotations

from collections.abc import Sequence

from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim
from dynamic_network_architectures.building_blocks.plain_conv_encoder import PlainConvEncoder
from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

LEAKY_SLOPE = 1e-2
LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def interpolating_decoder(
    encoder: PlainConvEncoder | ResidualEncoder,
    num_classes: int,
    n_conv_per_stage: int | Sequence[int],
    deep_supervision: bool,
    faithful: bool = False,
) -> UNetDecoder:
    """Build an nnU-Net decoder whose transposed convolutions are replaced by linear interpolation.

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

    Returns:
        A decoder, initialised like nnU-Net's networks; `forward(skips)` gives logits `(B, C, X, Y, Z)` or their list.

    Source: decoder 2 of LG-SSL (2025) and decoder B of MC-Net+ (2022); methods.md 2.3, 2.7 #16.
    """
    decoder = UNetDecoder(encoder, num_classes, n_conv_per_stage, deep_supervision)
    # The reference is only used for size estimates. It has to go before the initialisation, which would reach through
    # it and redraw the encoder's weights.
    del decoder.encoder
    decoder.transpconvs = nn.ModuleList(
        _upsampling_step(encoder, stage, faithful) for stage in range(1, len(encoder.output_channels))
    )
    decoder.apply(InitWeights_He(LEAKY_SLOPE))
    return decoder


def _upsampling_step(encoder: PlainConvEncoder | ResidualEncoder, stage: int, faithful: bool) -> nn.Sequential:
    """Replace the transposed convolution of decoder stage `stage` (1 = the one that reads the bottleneck)."""
    channels_below, channels = encoder.output_channels[-stage], encoder.output_channels[-(stage + 1)]
    upsample = nn.Upsample(
        scale_factor=tuple(float(stride) for stride in encoder.strides[-stage]),
        mode=LINEAR_MODES[convert_conv_op_to_dim(encoder.conv_op)],
        align_corners=faithful,
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
