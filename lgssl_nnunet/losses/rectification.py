"""Where two networks disagree on labelled voxels, and which of them is better. Everything computes in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from lgssl_nnunet.engine.distributed import total
from lgssl_nnunet.losses.consistency import masked_mean

_SMOOTH = 1e-5


def disagreement(p1: Tensor, p2: Tensor, has_regions: bool) -> Tensor:
    """Return where two networks predict different classes (B, 1, *S), or differ on a region (B, C, *S).

    Source: the difference mask of MCF (2023), for any number of classes; methods.md section 5.

    Args:
        p1: probabilities (B, C, *S).
        p2: the same shape.
        has_regions: channels are regions.
    """
    if has_regions:
        return (p1 > 0.5) ^ (p2 > 0.5)
    return p1.argmax(dim=1, keepdim=True) != p2.argmax(dim=1, keepdim=True)


def rectification(p: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of all channels on the selected voxels; 0 where none is selected.

    `sum_v D sum_c (p - Y)^2 / (C sum_v D)`.

    Source: MCF (2023); methods.md section 5.

    Args:
        p: probabilities (B, C, *S).
        target: (B, C, *S) in 0 and 1.
        mask: D, (B, 1, *S), or (B, C, *S) for regions.
    """
    return masked_mean((p.float() - target).square(), mask)


def dice_of_present_classes(p: Tensor, target: Tensor, annotated: Tensor, has_regions: bool) -> Tensor:
    """Return the squared-form Dice loss over the batch, averaged over the foreground channels that occur in it.

    A channel without a labelled voxel says nothing about which of two networks is better. 0 if all are like that. The
    batch is that of all processes, which so come to the same verdict.

    Source: the judge of MCF (2023); methods.md section 5.

    Args:
        p: probabilities (B, C, *S).
        target: (B, C, *S) in 0 and 1.
        annotated: (B, 1, *S), the voxels that count.
        has_regions: channels are regions, all of them foreground; otherwise channel 0 is background.
    """
    first = 0 if has_regions else 1
    p, target = p[:, first:].float() * annotated, target[:, first:] * annotated
    axes = (0, *range(2, p.ndim))
    overlap, volume, size = total(torch.stack([x.sum(axes) for x in (p * target, target, p.square())]))
    loss = 1 - (2 * overlap + _SMOOTH) / (size + volume + _SMOOTH)
    return masked_mean(loss, volume > 0)
