"""The cell of a benchmark: one training with everything that identifies it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.files import content_hash
from lgssl_nnunet.inference.models import BASELINE


@dataclass(frozen=True)
class Cell:
    """One training of a benchmark and all that decides its result, versions and hardware excepted.

    Attributes:
        dataset: folder name in `nnUNet_raw`.
        trainer: trainer class.
        budget: number of labelled cases; None for all of them.
        seed: seed of the draw of the labelled cases, and training seed.
        iterations: optimiser steps.
        configuration: such as "3d_fullres".
        planner: planner class.
        spacing: target spacing in mm (z y x) that overrides the planned one.
        settings: hyper-parameters that differ from the trainer's defaults, by name.
    """

    dataset: str
    trainer: str
    budget: int | None
    seed: int
    iterations: int
    configuration: str
    planner: str
    spacing: tuple[float, ...] | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def method(self) -> str:
        """The trainer with its settings, in the form in which `parse_method` reads it."""
        return method_label(self.trainer, dict(self.settings))

    @property
    def name(self) -> str:
        """A file name that tells the cell to people, made unique by a hash of its identity."""
        budget = "all" if self.budget is None else f"labeled{self.budget}"
        return f"{self.dataset}_{self.trainer}_{budget}_s{self.seed}_{content_hash(self.identity())[:10]}"

    def identity(self) -> dict[str, Any]:
        """Return the cell as JSON-like content."""
        return {
            "dataset": self.dataset,
            "trainer": self.trainer,
            "settings": dict(self.settings),
            "budget": "all" if self.budget is None else self.budget,
            "seed": self.seed,
            "iterations": self.iterations,
            "configuration": self.configuration,
            "planner": self.planner,
            "spacing": None if self.spacing is None else list(self.spacing),
        }

    def __str__(self) -> str:
        budget = "all labels" if self.budget is None else f"{self.budget} labels"
        return f"{self.dataset} {self.method}, {budget}, seed {self.seed}"


def cell_from_identity(identity: Mapping[str, Any]) -> Cell:
    """Return the cell whose `identity` this is.

    Raises:
        KeyError: an entry is missing.
    """
    return Cell(
        dataset=identity["dataset"],
        trainer=identity["trainer"],
        budget=None if identity["budget"] == "all" else int(identity["budget"]),
        seed=int(identity["seed"]),
        iterations=int(identity["iterations"]),
        configuration=identity["configuration"],
        planner=identity["planner"],
        spacing=None if identity["spacing"] is None else tuple(identity["spacing"]),
        settings=tuple(sorted(identity["settings"].items())),
    )


def method_label(trainer: str, settings: Mapping[str, Any]) -> str:
    """Return "Trainer" or "Trainer:name=value,name=value", in alphabetical order of the names."""
    words = ",".join(f"{name}={value}" for name, value in sorted(settings.items()))
    return f"{trainer}:{words}" if words else trainer


def parse_method(word: str) -> tuple[str, dict[str, Any]]:
    """Read "Trainer" or "Trainer:name=value,name=value".

    Returns:
        The trainer's name, and the settings that differ from its defaults, converted to their types.

    Raises:
        UsageError: no such trainer in this package, or no such hyper-parameter or value.
    """
    from lgssl_nnunet.engine.hyperparameters import request
    from lgssl_nnunet.registry import find_trainer, trainer_names

    trainer, _, words = word.partition(":")
    trainer_class = find_trainer(trainer)
    if trainer not in trainer_names():
        raise UsageError(f"{trainer} is nnU-Net's own and knows no budget: take {BASELINE}, nnU-Net on labelled cases.")
    pairs = [pair.partition("=") for pair in words.split(",") if pair]
    if any(not separator for _, separator, _ in pairs):
        raise UsageError(f"{word}: settings are written {trainer}:NAME=VALUE,NAME=VALUE.")
    defaults = trainer_class.hyperparameters
    chosen = request(defaults, {name: value for name, _, value in pairs}, trainer)
    return trainer, {
        name: getattr(chosen, name) for name, _, _ in pairs if getattr(chosen, name) != getattr(defaults, name)
    }
