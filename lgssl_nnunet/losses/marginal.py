"""The marginal loss: logits in which classes that a patch does not annotate are one with its background."""

from __future__ import annotations

import torch
from torch import Tensor

_NEVER = -1e9
"""A logit whose probability is 0 in float32, and whose product with 0 is no nan."""


def marginal_logits(logits: Tensor, known: Tensor, exclusive: bool) -> Tensor:
    """Return logits whose probabilities are summed over background and the classes that a patch does not annotate.

    A loss of them cannot tell background from a class not annotated: it leaves the probability as it is divided
    between them. Regions that a patch does not annotate are never predicted, which costs nothing where the target is
    0. Patches in which every class is known stay as they are, to the bit.

    Args:
        logits: (B, C, *S).
        known: (B, C), whether the patch's case annotates a channel; of exclusive classes the background, channel 0,
            always counts as known.
        exclusive: whether one class excludes the others (softmax); False for regions (sigmoid).

    Source: the marginal loss of Shi et al. (2021), the target-adaptive loss of Fang and Yan (2020).
    """
    logits = logits.float()
    hidden = ~known.reshape(*known.shape, *[1] * (logits.ndim - 2))
    if not exclusive:
        return logits.masked_fill(hidden, _NEVER)
    apart = ~hidden
    apart[:, 0] = False
    background = logits.masked_fill(apart, -torch.inf).logsumexp(dim=1, keepdim=True)
    merged = torch.where(hidden.any(dim=1, keepdim=True), background, logits[:, :1])
    return torch.cat([merged, logits[:, 1:].masked_fill(hidden[:, 1:], _NEVER)], dim=1)


def certain_labels(labels: Tensor, known: Tensor | None, exclusive: bool) -> Tensor:
    """Return labels without the background of patches that do not annotate every class, where it may be another class.

    Args:
        labels: (B, C, *S) in 0 and 1.
        known: see `marginal_logits`; None if every class is known in every patch.
        exclusive: see `marginal_logits`.
    """
    if known is None or not exclusive:
        return labels
    complete = known.all(dim=1).reshape(-1, *[1] * (labels.ndim - 1))
    return torch.cat([labels[:, :1] * complete, labels[:, 1:]], dim=1)
