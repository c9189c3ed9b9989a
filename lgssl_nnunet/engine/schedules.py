"""Weights and learning rates as functions of training progress."""

from __future__ import annotations

import math

import torch


def sigmoid_rampup(step: float, length: float) -> float:
    """Return exp(-5 (1 - min(step, length) / length)^2): 0.0067 at 0, 1 from `length` on.

    Source: Laine and Aila, "Temporal Ensembling", 2017; methods.md section 1.1.

    Args:
        step: current iteration, at least 0.
        length: iterations until the weight is 1; 0 means no ramp.

    Raises:
        ValueError: a negative step or length.
    """
    if step < 0 or length < 0:
        raise ValueError(f"step and length must not be negative, got {step} and {length}")
    if length == 0:
        return 1.0
    return math.exp(-5.0 * (1.0 - min(step, length) / length) ** 2)


def ema_decay(update: int, maximum: float) -> float:
    """Return min(1 - 1 / (update + 1), maximum): the teacher copies the student at update 0 and slows down.

    Source: Tarvainen and Valpola, "Mean teachers are better role models", 2017; methods.md section 1.1.
    """
    if not 0 <= maximum < 1:
        raise ValueError(f"maximum must lie in [0, 1), got {maximum}")
    return min(1.0 - 1.0 / (update + 1), maximum)


def slice_trust(step: int, length: int, first: float, stages: int) -> float:
    """Return the trust in a propagated label per slice of distance: `first`, then a cosine that falls towards 0.

    The published schedule has six stages of 1000 iterations and takes its cosine in 40 steps: 0.95, 0.9455, 0.7612,
    0.5, 0.2730 and 0.0737.

    Source: DeSCO (2023); methods.md section 9.

    Args:
        step: current iteration.
        length: iterations of the training.
        first: trust in the first stage.
        stages: number of equal stages.
    """
    stage = step * stages // length
    return first if stage == 0 else 0.5 * (math.cos(math.pi * (40 * stage // stages) / 40) + 1.0)


class CosineSchedule:
    """Cosine decay of the learning rate from its initial value to 0 over `num_epochs` epochs.

    Has the `step(epoch)` of nnU-Net's schedulers and accepts fractions of an epoch, because short schedules need a
    learning rate that moves every iteration.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, num_epochs: int) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.num_epochs = num_epochs
        self.step(0)

    def step(self, epoch: float) -> None:
        """Set the learning rate for `epoch`, which may be fractional."""
        progress = min(max(epoch / self.num_epochs, 0.0), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5 * self.initial_lr * (1.0 + math.cos(math.pi * progress))
