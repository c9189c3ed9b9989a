"""A U-Net whose decoder decides how much of each skip it lets in, voxel by voxel."""

from __future__ import annotations

import torch
from dynamic_network_architectures.building_blocks.helper import (
    convert_conv_op_to_dim,
    get_matching_instancenorm,
)
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from lgssl_nnunet.networks.unet import Logits, decode


class AttentionGate(nn.Module):
    """Additive attention: `x * psi` with `psi = sigmoid(IN(w ReLU(IN(W_g g) + IN(W_x x))))`, all W 1x1x1 convolutions.

    Instance normalisation stands where the published gate has batch normalisation, as everywhere in nnU-Net. W_g and
    W_x map to half the channels of the skip.

    Args:
        channels: of the skip x and of the gating signal g.
        dimensions: 2 or 3.

    Source: Attention U-Net (2018), as used by TAC (2023); methods.md section 10.
    """

    def __init__(self, channels: int, dimensions: int) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        norm = get_matching_instancenorm(dimension=dimensions)
        inner = max(1, channels // 2)
        # No biases: a normalisation follows each convolution.
        self.gating = nn.Sequential(convolution(channels, inner, 1, bias=False), norm(inner, affine=True))
        self.skip = nn.Sequential(convolution(channels, inner, 1, bias=False), norm(inner, affine=True))
        self.psi = nn.Sequential(
            nn.ReLU(inplace=True), convolution(inner, 1, 1, bias=False), norm(1, affine=True), nn.Sigmoid()
        )

    def forward(self, g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the gated skip.

        Args:
            g: gating signal (B, D, *S), the decoder's feature at the resolution of the skip.
            x: skip (B, D, *S).
        """
        return x * self.psi(self.gating(g) + self.skip(x))


class AttentionGatedUNet(nn.Module):
    """The plans' U-Net with an attention gate on every skip, before it is concatenated.

    Encoder and decoder keep their keys (`encoder.*`, `decoder.*`), so a stock checkpoint's weights fit them; the gates
    are `gates.*`. With the same torch seed, encoder and decoder start like those of a stock network.

    Args:
        network: a network built from the plans; its modules are taken over.

    Source: TAC (2023); methods.md section 10.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.decoder = network.decoder
        dimensions = convert_conv_op_to_dim(network.encoder.conv_op)
        # In the order of the decoder's stages: lowest resolution first.
        self.gates = nn.ModuleList(
            AttentionGate(channels, dimensions) for channels in reversed(network.encoder.output_channels[:-1])
        )
        self.gates.apply(InitWeights_He(0))

    def forward(
        self, x: torch.Tensor, with_skips: bool = False
    ) -> Logits | tuple[Logits, list[torch.Tensor], list[torch.Tensor]]:
        """Predict.

        Args:
            x: images (B, M, *S).
            with_skips: return the features of the encoder's stages (bottleneck last) and the gated skips as well, both
                full resolution first.

        Returns:
            Logits (B, C, *S), with deep supervision a list of them, full resolution first.
        """
        encoded = self.encoder(x)
        decoded = decode(self.decoder, encoded, gates=self.gates)
        return (decoded.logits, encoded, decoded.skips) if with_skips else decoded.logits
