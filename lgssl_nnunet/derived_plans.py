"""Plans derived from stored ones: options of a training that differ from them, under a name that tells them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import PlansError, PromptError, UsageError
from lgssl_nnunet.files import read_json_if_valid

_PLANNED = "planned"
"""The value of a trainer's `text_encoder` that leaves the vectors as they were planned."""


def derive_plans(
    plans: dict[str, Any],
    trainer_class: type,
    epochs: int | None,
    iterations_per_epoch: int | None,
    unlabeled_batch_size: int | None,
    seed: int | None,
    hyperparameters: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the plans themselves, or a derived copy whose name tells every option that differs from them.

    Args:
        plans: plans as they are stored.
        trainer_class: the method, whose hyper-parameters `hyperparameters` names.
        epochs: number of epochs; here and below None means as planned.
        iterations_per_epoch: optimiser steps per epoch.
        unlabeled_batch_size: unlabelled patches per step.
        seed: training seed.
        hyperparameters: values of the method's hyper-parameters by name.

    Returns:
        The plans; of another text encoder without its vectors, see `with_text`.

    Raises:
        UsageError: a value or name that does not fit.
        PlansError: nnU-Net's own plans, which cannot carry options.
    """
    _check_numbers(epochs, iterations_per_epoch, unlabeled_batch_size, seed)
    settings = plans.get("lgssl")
    if unlabeled_batch_size is not None and not getattr(trainer_class, "views", ()):
        raise UsageError(f"{trainer_class.__name__} has no unlabelled patches: leave out --unlabeled_batch_size.")
    asked = [epochs, iterations_per_epoch, unlabeled_batch_size, seed]
    if settings is None:
        if any(value is not None for value in asked) or hyperparameters:
            raise PlansError(f"{plans['plans_name']} are nnU-Net's own and cannot carry these options: plan with ours.")
        return plans
    schedule, training = dict(settings["schedule"]), dict(settings.get("training", {}))
    tags = []
    if epochs not in (None, schedule["num_epochs"]):
        schedule["num_epochs"] = epochs
        tags.append(f"e{epochs}")
    if iterations_per_epoch not in (None, schedule["iterations_per_epoch"]):
        schedule["iterations_per_epoch"] = iterations_per_epoch
        tags.append(f"i{iterations_per_epoch}")
    if unlabeled_batch_size not in (None, training.get("unlabeled_batch_size")):
        training["unlabeled_batch_size"] = unlabeled_batch_size
        tags.append(f"u{unlabeled_batch_size}")
    if seed not in (None, training.get("seed", 0)):
        training["seed"] = seed
        tags.append(f"s{seed}")
    changed = _changed_hyperparameters(trainer_class, training, hyperparameters or {})
    if changed:
        training["hyperparameters"] = {**training.get("hyperparameters", {}), **changed}
        tags += [f"{name}-{_tag(name, value)}" for name, value in sorted(changed.items())]
    if not tags:
        return plans
    training.setdefault("seed", 0)
    training.setdefault("planned_as", plans["plans_name"])
    # nnU-Net separates trainer, plans and configuration in folder names by a double underscore.
    tag = re.sub(r"_{2,}", "_", re.sub(r"[^A-Za-z0-9.+_-]", "-", "_".join(tags)))
    derived = {**plans, "plans_name": f"{plans['plans_name']}_{tag}"}
    derived["lgssl"] = {**settings, "schedule": schedule, "training": training}
    return derived


def with_text(plans: dict[str, Any], base: Mapping[str, Any], model_folder: Path) -> dict[str, Any]:
    """Return derived plans with the vectors of the text encoder that they name, if it is not that of the plans.

    A model folder whose training has begun keeps its vectors, so that its further folds and `--c` need no encoder.

    Args:
        plans: from `derive_plans`.
        base: the plans that they are derived from.
        model_folder: where they are trained.

    Raises:
        PromptError: the encoder cannot be used, or the plans were derived with one already.
        UsageError, MissingDependencyError: as `embed_again`.
    """
    encoder = _text_encoder(plans)
    if encoder == _text_encoder(base):
        return plans
    if encoder == _PLANNED:
        planned_as = base["lgssl"]["training"].get("planned_as")
        raise PromptError(
            f"text_encoder={_PLANNED}: {base['plans_name']} hold another encoder's vectors; name the plans that they "
            f"are derived from with -p {planned_as}."
        )
    from lgssl_nnunet.plans.text import embed_again

    ours = plans["lgssl"]
    stored = _text_of_model(model_folder, plans)
    text = embed_again(ours.get("text") or {}, encoder) if stored is None else stored
    return {**plans, "lgssl": {**ours, "text": text}}


def _text_encoder(plans: Mapping[str, Any]) -> str:
    return plans.get("lgssl", {}).get("training", {}).get("hyperparameters", {}).get("text_encoder", _PLANNED)


def are_of_one_training(stored: Mapping[str, Any] | None, plans: Mapping[str, Any]) -> bool:
    """Whether a training with the stored plans of a model goes on with these.

    `left_right`, by which images of others are compared in prediction, may be new: no training reads it, and planning
    did not always note it.
    """
    ours, theirs = (content.get("lgssl") if isinstance(content, dict) else None for content in (plans, stored))
    if isinstance(ours, dict) and isinstance(theirs, dict) and "left_right" not in theirs:
        plans = {**plans, "lgssl": {name: value for name, value in ours.items() if name != "left_right"}}
    return stored == plans


def _text_of_model(model_folder: Path, plans: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the text block of a model that was trained with these plans, None without one."""
    stored = read_json_if_valid(model_folder / "plans.json")
    if not isinstance(stored, dict) or not isinstance(stored.get("lgssl"), dict):
        return None
    text, planned = stored["lgssl"].get("text") or {}, plans["lgssl"].get("text") or {}
    same = are_of_one_training({**stored, "lgssl": {**stored["lgssl"], "text": planned}}, plans)
    return text if same and text.get("prompts") == planned.get("prompts") else None


def _tag(name: str, value: Any) -> str:
    """Return what a plans name says of a value; of a text encoder's path not the folders, which stay at home."""
    if name != "text_encoder" or Path(value).name == value:
        return str(value)
    kind, separator, path = value.rpartition(":")
    return f"{kind}{separator}{Path(path).name}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def _check_numbers(
    epochs: int | None, iterations_per_epoch: int | None, unlabeled_batch_size: int | None, seed: int | None
) -> None:
    limits = {
        "epochs": (epochs, 1),
        "iterations_per_epoch": (iterations_per_epoch, 1),
        "unlabeled_batch_size": (unlabeled_batch_size, 1),
        "seed": (seed, 0),
    }
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise UsageError(f"--{name} must be at least {least}, not {value}.")


def _changed_hyperparameters(
    trainer_class: type, training: Mapping[str, Any], values: Mapping[str, Any]
) -> dict[str, Any]:
    from lgssl_nnunet.engine.hyperparameters import override, request

    defaults = getattr(trainer_class, "hyperparameters", None)
    if defaults is None:
        if values:
            raise UsageError(f"{trainer_class.__name__} takes no hyper-parameters; leave out --set.")
        return {}
    planned = override(defaults, training.get("hyperparameters", {}), trainer_class.__name__)
    chosen = request(planned, values, trainer_class.__name__)
    return {name: getattr(chosen, name) for name in values if getattr(chosen, name) != getattr(planned, name)}
