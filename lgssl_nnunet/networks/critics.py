"""Critics: networks that tell predicted from annotated segmentations, voxel by voxel."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
LEAKY_SLOPE = 0.2
_CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
# Voxels whose 113 features are in memory at once where no gradient is needed.
_PIECE = 2**16


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each voxel (B, D, *S), independent of every other voxel."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features (B, D, *S)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelLinear(nn.Linear):
    """A convolution with kernels of one voxel, as the matrix product that it is (B, D, *S); *S of any length."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed channels (B, D', *S)."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class VoxelCritic(nn.Module):
    """Judges segmentations: how much each voxel and channel looks like an annotation. Computes in fp32.

    Convolutions C -> 16 -> 32 -> 64 -> C. By default they are 1x1x1, so the judgement of a voxel depends on its own
    probabilities alone, and a sample of voxels stands for a patch. Normalisation is over the channels of a voxel, for
    the same reason, and the last layer has none: its sigmoid is then the critic's own confidence, and a threshold on
    it means what it says (the published critics end with BatchNorm and LeakyReLU, which let nearly every voxel pass).

    Args:
        num_channels: channels C of the segmentation.
        num_dimensions: 2 or 3.
        spatial: kernels of 3 per axis instead of 1, which see a neighbourhood of 4 voxels.

    Source: Co-BioNet (2023); methods.md section 6.
    """

    def __init__(self, num_channels: int, num_dimensions: int, spatial: bool = False) -> None:
        super().__init__()
        self.spatial = spatial
        convolution = partial(_CONVOLUTIONS[num_dimensions], kernel_size=3, padding=1) if spatial else ChannelLinear
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise((num_channels, *WIDTHS)):
            layers += [convolution(before, after), ChannelNorm(after), nn.LeakyReLU(LEAKY_SLOPE)]
        self.layers = nn.Sequential(*layers, convolution(WIDTHS[-1], num_channels))

    def forward(self, p: Tensor) -> Tensor:
        """Return logits (B, C, *S) of "this is an annotation" for probabilities or labels (B, C, *S)."""
        with torch.autocast(p.device.type, enabled=False):
            return self.layers(p.float())

    def sample(self, maps: Tensor, voxels: int) -> Tensor:
        """Return a random part of maps that this critic can judge by itself, at the same place in all patches.

        Args:
            maps: (B, N, *S).
            voxels: about how many per patch; 0, or more than there are, returns the maps as they are.

        Returns:
            (B, N, V) single voxels, or for a spatial critic a box (B, N, *S').
        """
        shape = maps.shape[2:]
        if voxels == 0 or voxels >= shape.numel():
            return maps
        if not self.spatial:
            return maps.flatten(2)[:, :, torch.randint(shape.numel(), (voxels,), device=maps.device)]
        share = (voxels / shape.numel()) ** (1 / len(shape))
        for axis, size in enumerate(shape, start=2):
            length = max(round(share * size), 1)
            maps = maps.narrow(axis, int(torch.randint(size - length + 1, ())), length)
        return maps

    @torch.no_grad()
    def confidence(self, p: Tensor) -> Tensor:
        """Return for every voxel how sure the critic is that it is annotated (B, C, *S), without gradient.

        Computed piece by piece: 113 channels at full resolution would take more memory than the networks.
        """
        if self.spatial:
            return torch.cat([torch.sigmoid(self(patch)) for patch in p.split(1)])
        pieces = p.flatten(2).split(_PIECE, dim=2)
        return torch.cat([torch.sigmoid(self(piece)) for piece in pieces], dim=2).view(p.shape)
