"""Heads that turn the features of voxels into embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EmbeddingHeads(nn.Module):
    """For each network a projection into the space of a memory, and a prediction on top for what is compared with it.

    Each is linear, LayerNorm, ReLU, linear, on chosen voxels only and in fp32.

    Args:
        networks: their number.
        channels: D of their features.
        size: length of the embeddings.

    Source: CAML (2023), whose BatchNorm would treat memory and queries differently; methods.md section 8.
    """

    def __init__(self, networks: int, channels: int, size: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(_two_layers(channels, size) for _ in range(networks))
        self.predictions = nn.ModuleList(_two_layers(size, size) for _ in range(networks))

    def project(self, features: Sequence[Tensor], positions: Tensor) -> Tensor:
        """Return the mean of the networks' projections, (K, size), for the memory.

        Args:
            features: (B, D, *S) per network.
            positions: (K,), counted over (B, *S).
        """
        return torch.stack(self._projected(features, positions)).mean(dim=0)

    def forward(self, features: Sequence[Tensor], positions: Tensor) -> list[Tensor]:
        """Return each network's prediction (K, size); arguments as in `project`."""
        projected = self._projected(features, positions)
        with torch.autocast(positions.device.type, enabled=False):
            return [predict(p) for predict, p in zip(self.predictions, projected, strict=True)]

    def _projected(self, features: Sequence[Tensor], positions: Tensor) -> list[Tensor]:
        with torch.autocast(positions.device.type, enabled=False):
            return [project(_at(f, positions).float()) for project, f in zip(self.projections, features, strict=True)]


def _at(feature: Tensor, positions: Tensor) -> Tensor:
    """Return the features (K, D) of (B, D, *S) at positions, without a copy of the whole in another layout."""
    flat = feature.flatten(2)
    return flat.transpose(1, 2)[positions // flat.shape[2], positions % flat.shape[2]]


def _two_layers(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, size), nn.LayerNorm(size), nn.ReLU(), nn.Linear(size, size))
