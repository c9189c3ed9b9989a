"""Ties between words and image positions, on labelled patches. Everything computes in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lgssl_nnunet.losses.consistency import masked_mean
from lgssl_nnunet.losses.marginal import marginal_logits
from lgssl_nnunet.losses.prototypes import class_prototypes

_SMALLEST = 1e-6
_LEAST_PRESENCE = 1 / 8
"""Coarse positions that a class fills, in pieces or at once, from which on it has a mean feature: half a position along
each axis. The feature of a position with less of it is that of its neighbours."""


def class_map_loss(
    maps: Sequence[Tensor], labels: Tensor, annotated: Tensor, exclusive: bool, known: Tensor | None = None
) -> Tensor:
    """Cross-entropy between the class maps of the prompts' attention and the labels' shares of each coarse position.

    Source: ours, methods.md section 2.8.

    Args:
        maps: logits (B, C, *s_k), each at a coarse resolution of its own.
        labels: (B, C, *S) in 0 and 1, all 0 where there is no annotation.
        annotated: (B, 1, *S), where there is one.
        exclusive: whether one class excludes the others (softmax); False for regions (sigmoid).
        known: (B, C), whether the patch's case annotates a class, see `marginal_logits`; None if all are annotated.

    Returns:
        Mean over the annotated volume, averaged over the maps; 0 without annotation.
    """
    # Autocast would compute the logarithms in half precision.
    with torch.autocast(labels.device.type, enabled=False):
        if known is not None:
            maps = [marginal_logits(logits, known, exclusive) for logits in maps]
        return torch.stack([_class_map_loss(logits.float(), labels, annotated, exclusive) for logits in maps]).mean()


def _class_map_loss(logits: Tensor, labels: Tensor, annotated: Tensor, exclusive: bool) -> Tensor:
    present, counted = _shares(labels, logits), _shares(annotated, logits)
    if exclusive:
        losses = -(present * functional.log_softmax(logits, dim=1)).sum(dim=1)
    else:
        each = present * functional.logsigmoid(logits) + (counted - present) * functional.logsigmoid(-logits)
        losses = -each.mean(dim=1)
    return losses.sum() / counted.sum().clamp(min=_SMALLEST)


def alignment(image_feature: Tensor, prompt_feature: Tensor, labels: Tensor) -> Tensor:
    """Squared distance between each class's mean image feature and its prompt feature, both of length 1.

    Source: class-pooled alignment of Text-SemiSeg (2025), methods.md section 16; here both are normalised along the
    channels, and a class counts in a patch where it fills an eighth of a coarse position at least.

    Args:
        image_feature: (B, D, *s) of labelled patches.
        prompt_feature: (C, D).
        labels: (B, C, *S) in 0 and 1.

    Returns:
        Mean over the classes that count, in [0, 4]; 0 without any.
    """
    with torch.autocast(image_feature.device.type, enabled=False):
        pooled, present = class_prototypes(image_feature, _shares(labels, image_feature), "sample", _LEAST_PRESENCE)
        distances = functional.normalize(pooled[0], dim=1) - functional.normalize(prompt_feature.float(), dim=1)
        return masked_mean(distances.square().sum(dim=1), present[0])


def _shares(mask: Tensor, coarse: Tensor) -> Tensor:
    """Return the mask's mean over each position of a coarser map."""
    return functional.interpolate(mask.float(), coarse.shape[2:], mode="area")
