"""Text-vision selection fusion: prompts choose, per position, how much of a fused feature passes."""

from __future__ import annotations

import torch
from dynamic_network_architectures.building_blocks.helper import convert_dim_to_conv_op, get_matching_instancenorm
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

LEAKY_SLOPE = 1e-2


class TextVisionSelectionFusion(nn.Module):
    """TVSF at the bottleneck: fuse image feature `v` and prompt volume `tau`, weighted by a selection map.

    ```
    a = LeakyReLU(IN(G v) + IN(G tau))     G: 1x1x1 convolution D -> D, one set of weights for both operands
    s = sigmoid(IN(g a))                   g: 1x1x1 convolution D -> 1
    m = LeakyReLU(IN(K [v; tau]))          K: 1x1x1 convolution 2D -> D
    v' = m * s                             or, with the residual gate, v + gamma * (m * s)
    ```

    Instance normalisation without affine parameters (as published) fixes the mean of the selection map's logit at 0
    for every patch, so the gate can neither open nor close as a whole; with affine parameters it can. With a residual
    gate that starts at 0 the network starts as the plain one. Where the bottleneck is a single voxel the normalisation
    is undefined and skipped.

    Args:
        channels: width D of the bottleneck.
        dimensions: 2 or 3.
        affine_norm: learnable scale and shift in the instance normalisations (False: published).
        gate_start: first value of gamma in the path around the fusion; None for no such path (published).

    Source: LG-SSL (2025), TVSF; `Joint_Gate` of the released code (2024); methods.md 2.5, 2.7 #14, 2.8.
    """

    def __init__(
        self, channels: int, dimensions: int, *, affine_norm: bool = True, gate_start: float | None = 0.0
    ) -> None:
        super().__init__()
        convolution = convert_dim_to_conv_op(dimensions)
        normalisation = get_matching_instancenorm(dimension=dimensions)
        self.shared = convolution(channels, channels, 1)
        self.shared_norm_image = normalisation(channels, affine=affine_norm)
        self.shared_norm_prompt = normalisation(channels, affine=affine_norm)
        self.select = convolution(channels, 1, 1)
        self.select_norm = normalisation(1, affine=affine_norm)
        self.merge = convolution(2 * channels, channels, 1)
        self.merge_norm = normalisation(channels, affine=affine_norm)
        self.nonlin = nn.LeakyReLU(LEAKY_SLOPE)
        self.apply(InitWeights_He(LEAKY_SLOPE))
        # Without dimensions, so that it does not promote half-precision features to fp32.
        self.gamma = nn.Parameter(torch.tensor(float(gate_start))) if gate_start is not None else None

    def forward(self, v: torch.Tensor, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuse the bottleneck feature with the prompt volume.

        Args:
            v: bottleneck feature `(B, D, X, Y, Z)` (or 2D).
            tau: prompt volume, same shape.

        Returns:
            The fused feature, same shape, and the selection map `(B, 1, X, Y, Z)` with values in [0, 1].
        """
        image = _normalise(self.shared_norm_image, self.shared(v))
        prompt = _normalise(self.shared_norm_prompt, self.shared(tau))
        logit = self.select(self.nonlin(image + prompt))
        selection_map = torch.sigmoid(_normalise(self.select_norm, logit))
        merged = self.merge(torch.cat((v, tau), dim=1))
        selected = self.nonlin(_normalise(self.merge_norm, merged)) * selection_map
        if self.gamma is None:
            return selected, selection_map
        return v + self.gamma * selected, selection_map


def _normalise(norm: nn.Module, feature: torch.Tensor) -> torch.Tensor:
    """Apply instance normalisation, except to a single voxel, whose variance does not exist."""
    return feature if feature[0, 0].numel() == 1 else norm(feature)
