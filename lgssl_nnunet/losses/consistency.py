"""Consistency terms between predictions. All compute in fp32, whatever the precision around them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.nn import functional

from lgssl_nnunet.engine.distributed import num_processes, total
from lgssl_nnunet.losses.pseudo_labels import sharpened


def probabilities(logits: torch.Tensor, has_regions: bool) -> torch.Tensor:
    """Turn logits into probabilities, fp32.

    Args:
        logits: `(B, C, X, Y, Z)` (or 2D).
        has_regions: channels are overlapping regions (sigmoid) instead of exclusive classes (softmax).

    Returns:
        The same shape.
    """
    logits = logits.float()
    return torch.sigmoid(logits) if has_regions else torch.softmax(logits, dim=1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Average over the selected entries; 0 where none is selected.

    Args:
        values: any shape.
        mask: 0/1 or weights that broadcast against `values`, e.g. `(B, 1, X, Y, Z)`; None selects everything.

    Returns:
        `sum(mask * values) / max(sum(mask), 1)`, the mask counted once per entry of `values`. Of several processes each
        divides by the mean of their masks' sums: the mean of what they return is that of the whole batch.

    Source: methods.md 1.4, R12.
    """
    values = values.float()
    if mask is None:
        return values.mean()
    mask = mask.to(values.dtype).expand_as(values)
    # `where` and not a product, so that a non-finite value outside the mask does not turn the mean into NaN.
    selected = torch.where(mask != 0, values, torch.zeros_like(values))
    return (mask * selected).sum() * num_processes() / total(mask.sum()).clamp(min=1)


def agreement(q1: torch.Tensor, q2: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared difference of two decoders' probabilities, with gradient to both.

    Args:
        q1: probabilities `(B, C, X, Y, Z)` (or 2D).
        q2: the same shape.
        mask: optional selection of entries, see `masked_mean`.

    Raises:
        ValueError: the shapes differ.

    Source: L_agree of LG-SSL (2025), methods.md 2.6, 2.7 #6-#8.
    """
    if q1.shape != q2.shape:
        raise ValueError(f"The two predictions differ in shape: {tuple(q1.shape)} and {tuple(q2.shape)}.")
    return masked_mean((q1.float() - q2.float()).square(), mask)


def mutual_consistency(
    logits: Sequence[torch.Tensor], temperature: float, has_regions: bool, stop_gradient: bool = True
) -> torch.Tensor:
    """Mean squared difference of each prediction to each other's sharpened one, summed over ordered pairs.

    Not 0 where predictions agree, unless they are certain: it also drives them away from 0.5.

    Args:
        logits: one `(B, C, X, Y, Z)` (or 2D) per decoder.
        temperature: of the sharpening.
        has_regions: channels are regions.
        stop_gradient: no gradient to the sharpened predictions (the released code lets it through).

    Source: L_con of MC-Net+ (2022), methods.md section 4.
    """
    predicted = [probabilities(z, has_regions) for z in logits]
    targets = [sharpened(z, temperature, has_regions, stop_gradient) for z in logits]
    pairs = itertools.permutations(range(len(logits)), 2)
    return torch.stack([agreement(predicted[i], targets[j]) for i, j in pairs]).sum()


def difference_agreement(
    p1: torch.Tensor, q1: torch.Tensor, p2: torch.Tensor, q2: torch.Tensor, detach_labeled: bool = True
) -> torch.Tensor:
    """Mean squared difference of the two decoders' labelled-minus-unlabelled differences.

    Labelled patch i is paired with unlabelled patch i, so there must be as many of each.

    Args:
        p1: first decoder's probabilities of the labelled patches, `(B, C, X, Y, Z)` (or 2D).
        q1: first decoder's probabilities of the unlabelled patches, same shape.
        p2: second decoder's, labelled.
        q2: second decoder's, unlabelled.
        detach_labeled: no gradient to the labelled predictions: they have labels, and an unrelated unlabelled patch
            should not pull them (False: as drawn in the article's figure).

    Raises:
        ValueError: the shapes differ.

    Source: L_diff of LG-SSL (2025), methods.md 2.6, 2.7 #8, #11.
    """
    shapes = {tuple(tensor.shape) for tensor in (p1, q1, p2, q2)}
    if len(shapes) != 1:
        raise ValueError(
            f"The difference term pairs labelled with unlabelled patches and needs equal shapes, not {sorted(shapes)}."
        )
    if detach_labeled:
        p1, p2 = p1.detach(), p2.detach()
    return agreement(p1.float() - q1.float(), p2.float() - q2.float())


def distill(u1: torch.Tensor, u2: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """Per-channel distillation of logits in both directions, a selectable form of the agreement term.

    `T^2 * (BCE(sigmoid(u1/T), sg sigmoid(u2/T)) + BCE(sigmoid(u2/T), sg sigmoid(u1/T))) / 2`, averaged over all
    entries: each side learns from the other's softened prediction. Its minimum is T^2 times the entropy, not 0.

    Args:
        u1: logits `(B, C, X, Y, Z)` (or 2D).
        u2: the same shape.
        temperature: T.

    Raises:
        ValueError: the shapes differ.

    Source: released LG-SSL code (2024), without its extra division by T and one-sidedness; methods.md 2.6, 2.7 #7.
    """
    if u1.shape != u2.shape:
        raise ValueError(f"The two predictions differ in shape: {tuple(u1.shape)} and {tuple(u2.shape)}.")
    soft1, soft2 = u1.float() / temperature, u2.float() / temperature
    one_way = functional.binary_cross_entropy_with_logits(soft1, torch.sigmoid(soft2).detach())
    other_way = functional.binary_cross_entropy_with_logits(soft2, torch.sigmoid(soft1).detach())
    return temperature**2 * 0.5 * (one_way + other_way)
