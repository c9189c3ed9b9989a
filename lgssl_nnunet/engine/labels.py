"""Targets of the loader as methods need them: one channel per class, and where there is an annotation."""

from __future__ import annotations

import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor


def one_hot(target: Tensor, label_manager: LabelManager) -> Tensor:
    """Return the target with one channel per output channel of the network.

    Args:
        target: label map (B, 1, *S), or regions (B, R, *S) with a last channel more if there is an ignore label.
        label_manager: of the plans.

    Returns:
        (B, C, *S) in 0 and 1, float32; all 0 where the target is the ignore label.
    """
    annotation = annotated(target, label_manager)
    channels = label_manager.num_segmentation_heads
    if label_manager.has_regions:
        return target[:, :channels].float() * annotation
    classes = torch.where(annotation, target, torch.zeros_like(target)).long()
    spread = torch.zeros((target.shape[0], channels, *target.shape[2:]), device=target.device)
    return spread.scatter_(1, classes, 1.0) * annotation


def annotated(target: Tensor, label_manager: LabelManager) -> Tensor:
    """Return (B, 1, *S), true where the target is not the ignore label; same arguments as `one_hot`."""
    if not label_manager.has_ignore_label:
        return torch.ones_like(target[:, :1], dtype=torch.bool)
    if label_manager.has_regions:
        return target[:, -1:] == 0
    return target != label_manager.ignore_label


def without_hidden_regions(target: Tensor | list[Tensor], known: Tensor) -> Tensor | list[Tensor]:
    """Return regions that are 0 in patches which do not annotate them, though other regions may tell of their voxels.

    Args:
        target: regions (B, R, *S), with a last channel more if there is an ignore label, or a list of scales.
        known: (B, R).
    """
    if isinstance(target, list):
        return [without_hidden_regions(scale, known) for scale in target]
    regions = known.shape[1]
    mask = known.reshape(*known.shape, *[1] * (target.ndim - 2))
    return torch.cat([target[:, :regions] * mask, target[:, regions:]], dim=1)
