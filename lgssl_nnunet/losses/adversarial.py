"""What critics and the networks that they judge minimise. Everything computes in fp32."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from lgssl_nnunet.losses.consistency import masked_mean


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """Return what a critic minimises: the binary cross-entropy of telling annotations (1) from predictions (0).

    Args:
        critic: returns logits (B, C, *S) of "this is an annotation".
        real: labels (B, C, *S) in 0 and 1.
        fake: probabilities (B', C, *S'), detached.
        weight: (B, 1, *S), 0 where `real` is no annotation.

    Source: Co-BioNet (2023); methods.md section 6.
    """
    annotated = masked_mean(functional.softplus(-critic(real)), weight)
    return 0.5 * annotated + 0.5 * functional.softplus(critic(fake)).mean()


def adversarial_loss(critic: nn.Module, fake: Tensor) -> Tensor:
    """Return what a segmentation network minimises: the critic's doubt that its prediction is an annotation.

    Args:
        critic: the critic, frozen by the caller.
        fake: probabilities (B, C, *S) with gradient.

    Source: Co-BioNet (2023); methods.md section 6.
    """
    return functional.softplus(-critic(fake)).mean()
