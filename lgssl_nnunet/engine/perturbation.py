"""Noise on images, drawn anew for each pass through a network."""

from __future__ import annotations

import torch
from torch import Tensor


def with_noise(image: Tensor, deviation: float) -> Tensor:
    """Return the image with Gaussian noise, clipped at two standard deviations.

    Source: the noise of the mean-teacher methods (UA-MT, 2019); methods.md 1.4, R4.

    Args:
        image: (B, M, *S), z-scored intensities.
        deviation: standard deviation of the noise; 0 returns the image itself.
    """
    if deviation == 0:
        return image
    noise = torch.randn_like(image) * deviation
    return image + noise.clamp(-2 * deviation, 2 * deviation)
