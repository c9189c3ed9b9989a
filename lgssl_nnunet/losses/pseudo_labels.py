"""Learning from another prediction as if it were a label. Everything computes in fp32."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def hard_labels(p: Tensor, has_regions: bool) -> Tensor:
    """Return the most probable class per voxel, or the regions above 0.5, without gradient.

    Args:
        p: probabilities or logits of classes (B, C, *S); probabilities of regions.
        has_regions: channels are regions.

    Returns:
        (B, C, *S) in 0 and 1.
    """
    p = p.detach()
    if has_regions:
        return (p > 0.5).float()
    return torch.zeros_like(p, dtype=torch.float32).scatter_(1, p.argmax(dim=1, keepdim=True), 1.0)


def confidence(p: Tensor, has_regions: bool) -> Tensor:
    """Return the probability of the predicted class (B, 1, *S), or of each region's predicted side (B, C, *S)."""
    return torch.maximum(p, 1 - p) if has_regions else p.amax(dim=1, keepdim=True)


def sharpened(logits: Tensor, temperature: float, has_regions: bool, stop_gradient: bool = True) -> Tensor:
    """Return probabilities at a temperature below 1: soft pseudo-labels.

    `p_c^(1/T) / sum_k p_k^(1/T)`, which is softmax(z/T); computed from the logits because the power underflows.

    Source: MC-Net+ (2022), MCF (2023); methods.md 1.1.

    Args:
        logits: (B, C, *S).
        temperature: T.
        has_regions: channels are regions (sigmoid(z/T)).
        stop_gradient: return them without gradient.
    """
    scaled = (logits.detach() if stop_gradient else logits).float() / temperature
    return torch.sigmoid(scaled) if has_regions else torch.softmax(scaled, dim=1)


def cross_entropy(logits: Tensor, target: Tensor, has_regions: bool) -> Tensor:
    """Return the cross-entropy per voxel against labels, hard or soft.

    Args:
        logits: (B, C, *S).
        target: (B, C, *S), probabilities or 0 and 1.
        has_regions: channels are regions (binary cross-entropy of each).

    Returns:
        (B, 1, *S) for classes, (B, C, *S) for regions.
    """
    logits, target = logits.float(), target.float()
    if has_regions:
        return functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return -(target * torch.log_softmax(logits, dim=1)).sum(dim=1, keepdim=True)
