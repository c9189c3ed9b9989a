"""Dice and cross-entropy in which voxels count differently. Everything computes in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from lgssl_nnunet.losses.consistency import probabilities
from lgssl_nnunet.losses.pseudo_labels import cross_entropy

_SMOOTH = 1e-5


def weighted_dice(p: Tensor, target: Tensor, weight: Tensor, has_regions: bool, batch_dice: bool = False) -> Tensor:
    """Return one minus the mean soft Dice of the foreground, every sum weighted by `weight`.

    Args:
        p: probabilities (B, C, *S).
        target: (B, C, *S) in 0 and 1.
        weight: (B, 1, *S), not negative.
        has_regions: channels are regions, all of them foreground; otherwise channel 0 is background.
        batch_dice: one Dice over the batch instead of one per sample, as nnU-Net's plans say.
    """
    first = 0 if has_regions else 1
    p, target = p[:, first:].float(), target[:, first:].float()
    axes = (*((0,) if batch_dice else ()), *range(2, p.ndim))
    overlap = (weight * p * target).sum(axes)
    total = (weight * p).sum(axes) + (weight * target).sum(axes)
    return 1 - ((2 * overlap + _SMOOTH) / (total + _SMOOTH)).mean()


def weighted_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, has_regions: bool) -> Tensor:
    """Return `sum(w * CE) / sum(w)`, 0 where every weight is 0; arguments as in `weighted_dice`.

    Over the whole batch, as nnU-Net averages around an ignore label (DeSCO's code averages per sample first).
    """
    values = cross_entropy(logits, target, has_regions)
    weight = weight.float().expand_as(values)
    return (weight * values).sum() / weight.sum().clamp(min=_SMOOTH)


def weighted_dice_and_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor, has_regions: bool, batch_dice: bool = False
) -> Tensor:
    """Return the sum of weighted cross-entropy and weighted Dice loss, nnU-Net's loss with a weight per voxel.

    Source: BCP (2023) and DeSCO (2023) restrict and weigh their supervision so; methods.md sections 9 and 11.

    Args:
        logits: (B, C, *S).
        target: (B, C, *S) in 0 and 1.
        weight: (B, 1, *S).
        has_regions: channels are regions.
        batch_dice: see `weighted_dice`.
    """
    with torch.autocast(logits.device.type, enabled=False):
        dice = weighted_dice(probabilities(logits, has_regions), target, weight, has_regions, batch_dice)
        return dice + weighted_cross_entropy(logits, target, weight, has_regions)
