"""Clipping of gradients, each parameter group by itself."""

from __future__ import annotations

import torch
from torch import Tensor

# nnU-Net's.
GRADIENT_NORM_LIMIT = 12.0


def clip_gradients(optimizer: torch.optim.Optimizer) -> Tensor:
    """Clip the gradients of each parameter group by itself, so that no network shortens the step of another.

    Returns:
        The largest norm that was found; not finite if any gradient is not.
    """
    norms = [torch.nn.utils.clip_grad_norm_(group["params"], GRADIENT_NORM_LIMIT) for group in optimizer.param_groups]
    return torch.stack(norms).max()
