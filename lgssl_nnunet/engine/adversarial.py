"""The update of critics, apart from that of the networks they judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lgssl_nnunet.engine.clipping import clip_gradients
from lgssl_nnunet.engine.non_finite import NonFiniteError


class Adversary:
    """Critics with an optimiser of their own; frozen except during `update`.

    Frozen, they pass gradients on to the network that they judge and take none, so that no order of the two steps can
    mix them up.

    Args:
        critics: on their device already.
        learning_rate: of AdamW, constant.
        weight_decay: of AdamW.

    Source: the critics of Co-BioNet (2023), whose released code never trains them; methods.md section 6 and 1.4, R11.
    """

    def __init__(self, critics: nn.ModuleList, learning_rate: float, weight_decay: float) -> None:
        self.critics = critics
        groups = [{"params": list(critic.parameters())} for critic in critics]
        self.optimizer = torch.optim.AdamW(groups, learning_rate, weight_decay=weight_decay)
        critics.requires_grad_(False)

    def update(self, loss: Callable[[], Tensor]) -> float:
        """Train the critics for one step.

        Args:
            loss: computes their loss (scalar), from detached predictions.

        Returns:
            The value of the loss.

        Raises:
            NonFiniteError: loss or gradient is not finite; raised before the step.
        """
        self.critics.requires_grad_(True)
        try:
            value = loss()
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
        finally:
            self.critics.requires_grad_(False)
        norm = clip_gradients(self.optimizer)
        for what, number in (("the critics' loss", value.detach()), ("the gradient of the critics' loss", norm)):
            if not bool(torch.isfinite(number)):
                raise NonFiniteError(what, float(number))
        self.optimizer.step()
        return float(value.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state; the critics are networks of the trainer and kept there."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer.load_state_dict(state)
