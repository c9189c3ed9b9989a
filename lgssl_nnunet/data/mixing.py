"""Boxes for pasting one patch into another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def box_mask(patches: Tensor, sizes: Sequence[Sequence[int]]) -> Tensor:
    """Return boxes at random places, one per patch.

    Args:
        patches: (B, M, *S).
        sizes: edge lengths in voxels per patch, one per axis, at most the patch's.

    Returns:
        (B, 1, *S), true inside the box.
    """
    mask = torch.zeros((patches.shape[0], 1, *patches.shape[2:]), dtype=torch.bool, device=patches.device)
    for row, size in zip(mask, sizes, strict=True):
        corner = [int(torch.randint(0, full - edge + 1, ())) for full, edge in zip(row.shape[1:], size, strict=True)]
        inside = tuple(slice(start, start + edge) for start, edge in zip(corner, size, strict=True))
        row[(0, *inside)] = True
    return mask


def random_boxes(patches: Tensor, smallest: float, largest: float) -> Tensor:
    """Return a box per patch with a volume between two shares of the patch, and its proportions.

    Source: the CutMix of UniMatch in 3D; methods.md section 14.

    Args:
        patches: (B, M, *S).
        smallest: least share of the patch's volume, in [0, 1].
        largest: greatest share.

    Returns:
        (B, 1, *S), true inside the box.
    """
    shape = patches.shape[2:]
    shares = smallest + (largest - smallest) * torch.rand(len(patches))
    edges = shares ** (1 / len(shape))
    return box_mask(patches, [[max(1, round(full * float(edge))) for full in shape] for edge in edges])


def fixed_boxes(patches: Tensor, share_of_edge: float) -> Tensor:
    """Return a box per patch whose edges are `floor(share * edge)` of the patch's.

    Source: BCP (2023), with two thirds; methods.md section 11.

    Args:
        patches: (B, M, *S).
        share_of_edge: in [0, 1].

    Returns:
        (B, 1, *S), true inside the box.
    """
    # Through a rounded product: 2/3 of 9 is 5.999... in floating point.
    size = [int(round(full * share_of_edge, 6)) for full in patches.shape[2:]]
    return box_mask(patches, [size] * len(patches))
