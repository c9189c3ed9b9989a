"""How uncertain a prediction is, per voxel. Everything computes in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lgssl_nnunet.engine.perturbation import with_noise

_EPSILON = 1e-6


def entropy(p: Tensor, has_regions: bool) -> Tensor:
    """Return the entropy of probabilities in nats.

    Args:
        p: probabilities (B, C, *S).
        has_regions: channels are regions, each with an entropy of its own.

    Returns:
        (B, 1, *S) for classes, (B, C, *S) for regions.

    Source: methods.md 1.1 and R10.
    """
    p = p.float()
    if has_regions:
        return -(p * torch.log(p + _EPSILON) + (1 - p) * torch.log(1 - p + _EPSILON))
    return -(p * torch.log(p + _EPSILON)).sum(dim=1, keepdim=True)


def maximal_entropy(num_channels: int, has_regions: bool) -> float:
    """Return the entropy of a uniform prediction: ln C for classes, ln 2 for a region."""
    return math.log(2 if has_regions else num_channels)


def mean_of_passes(predict: Callable[[Tensor], Tensor], image: Tensor, deviation: float, passes: int) -> Tensor:
    """Return the mean prediction (B, C, *S) on an image under noise, without gradient and without keeping all of them.

    Two passes of a single patch go together: torch computes small 3D convolutions of a batch of one on a CPU several
    times more slowly.

    Args:
        predict: returns the probabilities (N, C, *S) of noisy images (N, M, *S).
        image: (B, M, *S).
        deviation: standard deviation of the noise.
        passes: their number T, at least 1.

    Source: Monte-Carlo dropout in UA-MT (2019); methods.md section 3.
    """
    together, total = (2 if len(image) == 1 else 1), 0.0
    with torch.no_grad():
        for first in range(0, passes, together):
            copies = [image] * min(together, passes - first)
            total = total + sum(predict(with_noise(torch.cat(copies), deviation)).split(len(image)))
        return total / passes


def entropy_threshold(start: float, end: float, ramp: float, num_channels: int, has_regions: bool) -> float:
    """Return a threshold on the entropy that moves from `start` to `end`, both as shares of the maximal entropy.

    Source: UA-MT (2019), 0.75 to 1, AC-MT (2023) and DeSCO (2023); methods.md sections 3, 7 and 9.

    Args:
        start: share at the beginning.
        end: share once the ramp is 1.
        ramp: progress of the ramp-up, from 0 to 1.
        num_channels: C.
        has_regions: channels are regions.
    """
    return (start + (end - start) * ramp) * maximal_entropy(num_channels, has_regions)
