"""The form of plans, checked when they are read: training makes folders of their names and opens their cases' files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lgssl_nnunet.dataset_conversion.geometry import are_spatial_axes
from lgssl_nnunet.errors import PlansError
from lgssl_nnunet.paths import is_plain_name

_LONGEST_NAME = 200
"""The names of folders add trainer and configuration to it, and may have 255 bytes."""
_NEEDED = ("split", "schedule")
_COUNTS = ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch")
_SCHEDULES = {"optimizer": ("sgd", "adamw"), "lr_schedule": ("poly", "cosine")}


def require_form(plans: Any, file: Path) -> None:
    """Refuse plans whose names are no plain names, or whose block of this package is not as planning writes it.

    What nnU-Net reads of them is left to nnU-Net.

    Args:
        plans: content of the file.
        file: a plans file in a dataset's folder in `nnUNet_preprocessed`.

    Raises:
        PlansError: with the first thing that is wrong.
    """
    problem = next(_problems(plans, file.parent.name), None)
    if problem is not None:
        raise PlansError(f"{file}: {problem}; plan the dataset again with lgssl_plan_and_preprocess.")


def _problems(plans: Any, dataset: str) -> Iterator[str]:
    if not isinstance(plans, dict):
        yield "the file holds no JSON object"
        return
    if not is_plain_name(plans.get("plans_name"), _LONGEST_NAME):
        yield "plans_name is no plain name"
    if plans.get("dataset_name") != dataset:
        yield f"dataset_name is {str(plans.get('dataset_name'))[:100]!r}, and the plans lie in the folder of {dataset}"
    configurations = plans.get("configurations")
    if not isinstance(configurations, dict) or not all(isinstance(c, dict) for c in configurations.values()):
        yield "configurations is no object of objects"
        return
    for name, configuration in configurations.items():
        if not is_plain_name(configuration.get("data_identifier", name), _LONGEST_NAME):
            yield f"data_identifier of {name} is no plain name"
        if not _is_count(configuration.get("batch_size", 1)):
            yield f"batch_size of {name} is no whole number of 1 or more"
    if "lgssl" in plans:
        yield from _block_problems(plans["lgssl"])


def _block_problems(block: Any) -> Iterator[str]:
    if not isinstance(block, dict):
        yield "lgssl is no object"
        return
    yield from (f"lgssl has no {name}" for name in _NEEDED if name not in block)
    yield from (
        f"{name} in lgssl is not as planning writes it"
        for name, is_right in _BLOCK.items()
        if name in block and not is_right(block[name])
    )


def _is_split(split: Any) -> bool:
    return (
        isinstance(split, dict)
        and split.keys() >= {"labeled", "unlabeled"}
        and all(isinstance(cases, list) and all(map(is_plain_name, cases)) for cases in split.values())
    )


def _is_schedule(schedule: Any) -> bool:
    return (
        isinstance(schedule, dict)
        and all(_is_count(schedule.get(name)) for name in _COUNTS)
        and all(_is_number(schedule.get(name)) and schedule[name] >= 0 for name in ("initial_lr", "weight_decay"))
        and all(schedule.get(name) in choices for name, choices in _SCHEDULES.items())
    )


def _is_text(text: Any) -> bool:
    if not isinstance(text, dict):
        return text is None
    rows = text.get("embeddings")
    return (
        isinstance(rows, list)
        and all(isinstance(row, list) and all(map(_is_number, row)) for row in rows)
        and isinstance(text.get("regions", False), bool)
    )


def _is_axes(axes: Any) -> bool:
    return axes is None or are_spatial_axes(axes)


def _is_left_right(lying: Any) -> bool:
    return isinstance(lying, dict) and lying.get("axis") in (0, 1, 2) and lying.get("sign") in (-1, 1)


def _is_training(training: Any) -> bool:
    return (
        isinstance(training, dict)
        and isinstance(training.get("hyperparameters", {}), dict)
        and is_plain_name(training.get("planned_as", "plans"))
        and type(training.get("seed", 0)) is int
        and 0 <= training.get("seed", 0) < 2**63
        and (training.get("unlabeled_batch_size") is None or _is_count(training["unlabeled_batch_size"]))
    )


def _is_twins(twins: Any) -> bool:
    return isinstance(twins, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(is_plain_name, pair)) for pair in twins
    )


def _is_annotation(annotation: Any) -> bool:
    slices = annotation.get("slices") if isinstance(annotation, dict) else None
    return (
        isinstance(slices, dict)
        and all(isinstance(indices, dict) for indices in slices.values())
        and annotation.keys() >= {"registration", "version"}
        and is_plain_name(annotation.get("planned_as"))
    )


def _is_partial_labels(partial: Any) -> bool:
    return isinstance(partial, dict) and all(map(_is_texts, partial.values()))


def _is_texts(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)


_BLOCK: Mapping[str, Callable[[Any], bool]] = {
    "split": _is_split,
    "schedule": _is_schedule,
    "text": _is_text,
    "mirroring_axes": _is_axes,
    "left_right": _is_left_right,
    "training": _is_training,
    "twins": _is_twins,
    "sparse_annotation": _is_annotation,
    "partial_labels": _is_partial_labels,
    "unseen_classes": _is_texts,
}
