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
    return torch.stack([_clip(group["params"]) for group in optimizer.param_groups]).max()


def _clip(parameters: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM_LIMIT)
    # A group without gradients, because its term has no weight, has the norm 0 on the CPU, wherever the network is.
    return norm.to(parameters[0].device)
