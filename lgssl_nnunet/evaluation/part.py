"""Which cases and classes are evaluated where not all are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lgssl_nnunet.dataset_conversion.volumes import clean_identifier
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.evaluation.case import LabelOrRegion
from lgssl_nnunet.files import read_json_if_valid
from lgssl_nnunet.plans.partial_labels import members_there

logger = logging.getLogger(__name__)


def cases_of_group(dataset: Mapping[str, Any], group: str | None) -> Callable[[str], bool]:
    """Return whether a case belongs to a group of dataset.json; without a group every case does.

    Args:
        dataset: content of dataset.json.
        group: name of the group.

    Raises:
        UsageError: there is no such group.
    """
    if group is None:
        return lambda case: True
    groups = dataset.get("groups") or {}
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
    from lgssl_nnunet.inference.predict import RECORD

    written = ((read_json_if_valid(prediction / RECORD) or {}).get("settings") or {}).get("classes")
    annotated = (dataset.get("annotated") or {}).get(group)
    limits = [limit for limit in (written, annotated) if limit is not None]
    left = {key: name for key, name in names.items() if all(name in limit for limit in limits)}
    if not left:
        raise UsageError(
            f"{prediction}: nothing can be measured, because it holds {', '.join(written)} only and "
            f"{group or 'dataset.json'} has {', '.join(annotated or names.values())}; predict those classes."
        )
    if len(left) < len(names):
        logger.info("Measured are %d of %d classes: %s.", len(left), len(names), ", ".join(left.values()))
    return left


def summary_name(group: str | None) -> str:
    """Return the name of the summary, one for each group."""
    return "summary.json" if group is None else f"summary_{clean_identifier(group)}.json"
