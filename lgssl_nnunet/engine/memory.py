"""A memory of voxel embeddings of the labelled cases, kept from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lgssl_nnunet.errors import UsageError


class MemoryBank:
    """Embeddings of labelled voxels by case and class; a case's entry is replaced whenever the case is drawn.

    Args:
        size: length D of an embedding.
        capacity: embeddings kept per case and class.
        device: where they lie.

    Source: the labelled memory of CAML (2023), which keeps every voxel; methods.md section 8.
    """

    def __init__(self, size: int, capacity: int, device: torch.device) -> None:
        self.size = size
        self.capacity = capacity
        self.device = device
        self.entries: dict[str, dict[int, Tensor]] = {}

    def replace(self, case: str, embeddings: Tensor, classes: Tensor) -> None:
        """Forget what the case had and keep, of each class, as many embeddings as there is room for.

        Args:
            case: identifier.
            embeddings: (N, D); those of a class in random order, because the first ones are kept.
            classes: (N,), class of each.
        """
        self.entries[case] = {
            int(c): embeddings[classes == c][: self.capacity].detach().clone() for c in classes.unique()
        }

    def sample(self, count: int) -> Tensor:
        """Return `count` random embeddings of each class, (K * count, D), of the K classes that have as many.

        They are drawn from all cases together, without replacement.
        """
        drawn = [torch.empty(0, self.size, device=self.device)]
        for c in sorted({c for entry in self.entries.values() for c in entry}):
            stored = torch.cat([entry[c] for entry in self.entries.values() if c in entry])
            if len(stored) >= count:
                drawn.append(stored[torch.randperm(len(stored), device=self.device)[:count]])
        return torch.cat(drawn)

    def state_dict(self) -> dict[str, Any]:
        """Return the embeddings of all cases."""
        return {case: dict(entry) for case, entry in self.entries.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.entries = {case: dict(entry) for case, entry in state.items()}


def check_sizes(hp: Any, cases: int, classes: int) -> None:
    """Refuse sizes with which no voxel is ever compared with the memory.

    Args:
        hp: with `memory_size` (embeddings kept per case and class), `memory_samples` (those of a class that are drawn,
            or none), `max_queries` (voxels of a class that are compared, for two classes) and `correlation_weight` (of
            the comparison, at 0 of which any size will do).
        cases: training cases.
        classes: with background.

    Raises:
        UsageError: the memory never holds enough for a draw, or the queries are fewer than the classes.
    """
    if not hp.correlation_weight:
        return
    most = hp.memory_size * cases
    if most < hp.memory_samples:
        raise UsageError(
            f"With memory_size={hp.memory_size} and {cases} training cases the memory holds {most} embeddings of a "
            f"class at most, and memory_samples={hp.memory_samples} draws none from fewer: use --set "
            f"memory_size={-(-hp.memory_samples // cases)} or more, or --set memory_samples={most} or less."
        )
    if 2 * hp.max_queries < classes:
        raise UsageError(
            f"max_queries={hp.max_queries} leaves no voxel for each of {classes} classes: use --set "
            f"max_queries={-(-classes // 2)} or more."
        )
