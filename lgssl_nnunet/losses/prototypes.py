"""Mean features of classes, of labelled and of unlabelled patches. Everything computes in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lgssl_nnunet.engine.distributed import total
from lgssl_nnunet.losses.consistency import masked_mean

RESIZING = {"nearest": "nearest-exact", "area": "area"}
DENOMINATORS = ("sample", "batch")
_SMALLEST = 1e-6


def prototype_consistency(
    features: Sequence[Tensor],
    labeled_mask: Tensor,
    unlabeled_mask: Tensor,
    denominator: str = "sample",
    min_voxels: float = 1.0,
    resize: str = "nearest",
    stop_gradient: bool = True,
) -> Tensor:
    """Mean squared difference of labelled and unlabelled class prototypes, summed over scales.

    Source: L_enc and L_att of TAC (2023); methods.md section 10.

    Args:
        features: (B_l + B_u, D_k, *S_k) per scale, labelled patches first.
        labeled_mask: labels (B_l, C, *S) in 0 and 1.
        unlabeled_mask: probabilities (B_u, C, *S).
        denominator: see `class_prototypes`; "batch" needs as many labelled as unlabelled patches.
        min_voxels: see `class_prototypes`; a class counts where both sides have it.
        resize: how masks get the resolution of a feature, out of `RESIZING`.
        stop_gradient: leave labelled prototypes as they are.
    """
    n, losses = len(labeled_mask), []
    # Autocast would multiply in half precision.
    with torch.autocast(labeled_mask.device.type, enabled=False):
        for feature in features:
            masks = [_resized(mask, feature.shape[2:], resize) for mask in (labeled_mask, unlabeled_mask)]
            ours, we_have = class_prototypes(feature[:n], masks[0], denominator, min_voxels)
            theirs, they_have = class_prototypes(feature[n:], masks[1], denominator, min_voxels)
            ours = ours.detach() if stop_gradient else ours
            losses.append(masked_mean((theirs - ours).square(), (we_have & they_have)[..., None]))
    return torch.stack(losses).sum()


def class_prototypes(feature: Tensor, mask: Tensor, denominator: str, min_voxels: float) -> tuple[Tensor, Tensor]:
    """Return the prototype of each class, and whether it has one.

    Args:
        feature: (B, D, *S).
        mask: (B, C, *S) in [0, 1].
        denominator: "sample": the mean of the feature over the class in each sample, averaged over the samples that
            have it. "batch", as published: the sum over the class in each sample, divided by the size of the class in
            the whole batch; the samples stay apart. Either counts the samples of all processes.
        min_voxels: a sample has a class if its mask adds up to as much.

    Returns:
        Prototypes (N, C, D) and presence (N, C), where N is 1 for "sample" and B for "batch".
    """
    mask = mask.float().flatten(2)
    sums = mask @ feature.float().flatten(2).transpose(1, 2)
    sizes = mask.sum(dim=2, keepdim=True)
    present = sizes >= min_voxels
    if denominator == "batch":
        return sums / total(sizes.sum(dim=0, keepdim=True)).clamp(min=_SMALLEST), present[..., 0]
    means = present * sums / sizes.clamp(min=_SMALLEST)
    samples = total(present.sum(dim=0, keepdim=True))
    return total(means.sum(dim=0, keepdim=True)) / samples.clamp(min=1), samples[..., 0] > 0


def _resized(mask: Tensor, shape: torch.Size, resize: str) -> Tensor:
    return mask if mask.shape[2:] == shape else functional.interpolate(mask, shape, mode=RESIZING[resize])
