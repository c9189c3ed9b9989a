"""Which cases and classes are evaluated where not all are."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lgssl_nnunet.data.partial_labels import PartialLabel, class_values
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.evaluation.case import LabelOrRegion
from lgssl_nnunet.files import content_hash, read_json_if_valid
from lgssl_nnunet.plans.partial_labels import (
    annotated_classes,
    double_problems,
    form_problems,
    members_there,
    named_cases,
)
from lgssl_nnunet.problems import first_of, raise_if_any

logger = logging.getLogger(__name__)

DESCRIPTION = "The dataset.json of the predictions"
_TABLES = ("per_case", "per_class")
"""How the names of the tables beside a summary end."""
_HASH_LENGTH = 8
_LONGEST_NAME = 150
"""Bytes of a group's name; file systems take 255 for a whole file name."""
_SHOWN = 5


def cases_of_group(dataset: Mapping[str, Any], group: str | None) -> Callable[[str], bool]:
    """Return whether a case belongs to a group of dataset.json; without a group every case does.

    Args:
        dataset: content of dataset.json.
        group: name of the group.

    Raises:
        DatasetError: the groups are not as they must be.
        UsageError: there is no such group.
    """
    if group is None:
        return lambda case: True
    groups = dataset.get("groups") or {}
    raise_if_any(form_problems({"groups": groups}), DESCRIPTION)
    if group not in groups:
        there = f"it has {', '.join(groups)}" if groups else "it has none; name the raw dataset's with -djfile"
        raise UsageError(f"--group {group}: dataset.json has no such group; {there}.")
    members = groups[group]
    return lambda case: bool(members_there(members, {case}))


def classes_of_part(
    names: Mapping[LabelOrRegion, str], dataset: Mapping[str, Any], group: str | None, prediction: Path
) -> dict[LabelOrRegion, str]:
    """Return the classes to measure: those that the group annotates and that lgssl_predict was asked to write.

    Args:
        names: all classes.
        dataset: content of dataset.json.
        group: the evaluated group; None for all cases.
        prediction: folder with the predictions.

    Raises:
        UsageError: no class is left.
    """
    written = _written_classes(prediction)
    annotated = (dataset.get("annotated") or {}).get(group)
    labels = dataset["labels"]
    asked = [limit for limit in (written, annotated) if limit is not None]
    limits = [{class_values(labels[name]) for name in limit if name in labels} for limit in asked]
    # By values, since two names may be one class.
    left = {key: name for key, name in names.items() if all(class_values(key) in limit for limit in limits)}
    if not left:
        raise UsageError(
            f"{prediction}: nothing can be measured, because it holds {', '.join(written or names.values())} only and "
            f"{group or 'dataset.json'} has {', '.join(annotated or names.values())}; predict those classes."
        )
    if len(left) < len(names):
        logger.info("Measured are %d of %d classes: %s.", len(left), len(names), ", ".join(left.values()))
    return left


def _written_classes(prediction: Path) -> list[str] | None:
    """Return the classes that lgssl_predict was asked to write; None for all, or without a record that tells."""
    from lgssl_nnunet.inference.predict import RECORD

    found: Any = read_json_if_valid(prediction / RECORD)
    for key in ("settings", "classes"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, list) else None


def partial_references(
    dataset: Mapping[str, Any], cases: Collection[str], names: Mapping[LabelOrRegion, str], prediction: Path
) -> dict[str, PartialLabel]:
    """Return how the references of those cases are read that annotate only some of the classes.

    Args:
        dataset: content of dataset.json.
        cases: the evaluated cases.
        names: the classes to measure.
        prediction: folder with the predictions.

    Raises:
        DatasetError: a case is in two annotated groups.
        UsageError: no case annotates any of the classes.
    """
    if dataset.get("annotated"):
        raise_if_any(double_problems(dataset["annotated"], dataset.get("groups", {}), set(cases)), DESCRIPTION)
        _tell_unnamed(dataset, cases)
    annotated = annotated_classes(dataset, cases)
    partial = {case: PartialLabel.of(dataset["labels"], classes) for case, classes in annotated.items()}
    if len(partial) == len(cases) and all(label.hides(key) for label in partial.values() for key in names):
        found = [name for name in dataset["labels"] if any(name in classes for classes in annotated.values())]
        raise UsageError(
            f"{prediction}: nothing can be measured, because only {', '.join(names.values())} would be compared and "
            f"the references annotate {', '.join(found)}; predict those classes, or correct 'annotated'."
        )
    if partial:
        logger.info("%d reference(s) annotate only some of the classes; the others are left out there.", len(partial))
    return partial


def _tell_unnamed(dataset: Mapping[str, Any], cases: Collection[str]) -> None:
    """Say which cases no key names: a model's dataset.json does not know cases that were added since its planning.

    Where single cases are named and no group, the others are complete as a rule.
    """
    groups = dataset.get("groups", {})
    named = named_cases(dataset["annotated"], groups, set(cases))
    unnamed = [case for case in cases if case not in named]
    if unnamed and any(key in groups for key in dataset["annotated"]):
        logger.warning(
            "%d reference(s) that 'annotated' of dataset.json does not name count as annotated completely: %s. If they "
            "are newer than this dataset.json, name a newer one with -djfile.",
            len(unnamed),
            first_of(unnamed, _SHOWN),
        )


def name_for_group(file_name: str, group: str | None) -> str:
    """Return the name of a file of which each group has its own.

    Letters of any script stay. A group whose name cannot stand there as it is, or ends like that of a table beside the
    summary, gets a hash of its name, so that no two groups have one file (but for capitals where a disk ignores them).
    """
    if group is None:
        return file_name
    stem, _, suffix = file_name.rpartition(".")
    name = re.sub(r"[^\w.-]+", "_", group).encode()[:_LONGEST_NAME].decode(errors="ignore")
    if name != group or name.endswith(_TABLES):
        name += f"_{content_hash(group)[:_HASH_LENGTH]}"
    return f"{stem}_{name}.{suffix}"
