"""Which cases of the plans train, which train without a label, and which validate in a fold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from lgssl_nnunet.dataset_conversion.twins import without_twins


def fold_cases(settings: Mapping[str, Any], fold: int | str) -> tuple[list[str], list[str]]:
    """Return training and validation cases out of the labelled cases of the plans.

    `all` trains on every labelled case and validates on the same; folds 0 to 4 are nnU-Net's five-fold split inside
    the labelled cases, without training on twins of the validation cases.

    Args:
        settings: the plans' block `lgssl`.
        fold: "all" or a number.
    """
    labeled = sorted(settings["split"]["labeled"])
    if fold == "all":
        return labeled, labeled
    split = generate_crossval_split(labeled, seed=12345, n_splits=5)[int(fold)]
    validation = list(split["val"])
    return without_twins(list(split["train"]), validation, settings.get("twins", [])), validation


def fold_unlabeled(settings: Mapping[str, Any], fold: int | str) -> list[str]:
    """Return the unlabelled cases of the plans, without twins of the fold's validation cases."""
    cases = sorted(settings["split"]["unlabeled"])
    return cases if fold == "all" else without_twins(cases, fold_cases(settings, fold)[1], settings.get("twins", []))


def fold_partly_annotated(settings: Mapping[str, Any], fold: int | str) -> list[str]:
    """Return the fold's training cases that leave a class open."""
    return [case for case in fold_cases(settings, fold)[0] if case in settings.get("partial_labels", {})]
