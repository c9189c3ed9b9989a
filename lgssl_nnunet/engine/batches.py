"""What a method receives in a step and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LabeledBatch:
    """Patches with a segmentation.

    Attributes:
        image: (B, M, *S), normalised intensities.
        target: one (B, 1, *S_k) label map (or (B, R, *S_k) regions) per deep-supervision scale, finest first; a single
            tensor without deep supervision.
        keys: case identifier of each patch.
        known: (B, C), whether the patch's case annotates a channel of the network's output (background counts as
            annotated); None if every class is annotated in every patch.
    """

    image: Tensor
    target: list[Tensor] | Tensor
    keys: tuple[str, ...]
    known: Tensor | None = None


@dataclass(frozen=True)
class UnlabeledBatch:
    """Patches without a true segmentation: views of the same voxels, alike in geometry and different in intensity.

    Attributes:
        weak: (B, M, *S), geometric augmentation only; None if the trainer did not ask for it.
        strong: (B, M, *S), nnU-Net's intensity augmentation on top; None if the trainer did not ask for it.
        keys: case identifier of each patch.
        target: pseudo-labels from files, as `LabeledBatch.target`; None for a method without such files.
    """

    weak: Tensor | None
    strong: Tensor | None
    keys: tuple[str, ...]
    target: list[Tensor] | Tensor | None = None


def finest(scales: Tensor | list[Tensor]) -> Tensor:
    """Return the full resolution of what a network or a loader gives with deep supervision, or without."""
    return scales if isinstance(scales, Tensor) else scales[0]


def rows(scales: Tensor | list[Tensor], which: slice | list[int] | Tensor) -> Tensor | list[Tensor]:
    """Return some patches of (B, C, *S), or of each in a list, such as the scales of a network's output."""
    return scales[which] if isinstance(scales, Tensor) else [scale[which] for scale in scales]


@dataclass(frozen=True)
class Term:
    """One named part of the loss.

    Attributes:
        value: scalar tensor.
        weight: factor in the sum; a term of weight 0 is logged and does not enter the backward pass.
        uses_unlabeled: whether the term depends on unlabelled patches.
    """

    value: Tensor
    weight: float = 1.0
    uses_unlabeled: bool = False
