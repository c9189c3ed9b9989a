"""The mean teacher: an exponential moving average of the student's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lgssl_nnunet.engine.schedules import ema_decay


class EMATeacher:
    """Frozen average of a student network, in evaluation mode (InstanceNorm is the same in both modes).

    Source: Tarvainen and Valpola, 2017; methods.md sections 1.1 and 12. The first update copies the student. Averages
    parameters, each once (nnU-Net's networks list shared tensors under several names), and copies buffers.
    """

    def __init__(self, student: nn.Module, decay: float = 0.99) -> None:
        self.decay = decay
        self.averaged = AveragedModel(student, avg_fn=self._average)
        self.averaged.requires_grad_(False)
        self.averaged.eval()

    def _average(self, teacher: Tensor, student: Tensor, num_averaged: Tensor | int) -> Tensor:
        decay = ema_decay(int(num_averaged), self.decay)
        return teacher + (1.0 - decay) * (student.to(teacher.dtype) - teacher)

    @property
    def network(self) -> nn.Module:
        """The teacher network."""
        return self.averaged.module

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move the teacher towards the student; call it after the optimiser's step."""
        self.averaged.update_parameters(student)

    def restart(self, student: nn.Module) -> None:
        """Copy a student whose weights were replaced before the first update; this counts as none."""
        self.network.load_state_dict(student.state_dict())

    @torch.no_grad()
    def __call__(self, image: Tensor, dropout: bool = False, **options: Any) -> Any:
        """Return the teacher's logits for `image` (B, M, *S), without gradient.

        Args:
            image: (B, M, *S).
            dropout: draw the network's dropout, for a Monte-Carlo pass.
            **options: what else the network's call takes and answers with.
        """
        self.averaged.train(dropout)
        logits = self.averaged(image, **options)
        self.averaged.eval()
        return logits

    def state_dict(self) -> dict[str, Any]:
        """Return weights and update count."""
        return self.averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.averaged.load_state_dict(state)
