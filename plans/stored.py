"""Finding what planning has left: the preprocessed folder of a dataset and its plans."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import DatasetError, PlansError, UsageError
from lgssl_nnunet.files import read_json, read_json_if_valid
from lgssl_nnunet.paths import is_dataset
from lgssl_nnunet.plans.form import require_form

logger = logging.getLogger(__name__)

# Blocks of plans that belong to one run or one kind of annotation: only their name asks for such plans.
_DERIVED_BLOCKS = {"training", "sparse_annotation"}


def preprocessed_folder(dataset: int | str) -> Path:
    """Return a dataset's folder in `nnUNet_preprocessed`, which must be set.

    Args:
        dataset: id or name.

    Raises:
        UsageError: no dataset or several datasets of that id or name.
    """
    root = Path(os.environ["nnUNet_preprocessed"])
    known = sorted(folder.name for folder in root.glob("Dataset*_*") if folder.is_dir())
    matches = [name for name in known if is_dataset(name, dataset)]
    if len(matches) == 1:
        return root / matches[0]
    listing = f" It holds: {', '.join(known)}." if known else ""
    remedy = "Plan it with lgssl_plan_and_preprocess first." if not matches else "Give the full name."
    problem = "There is no" if not matches else "There is more than one"
    raise UsageError(f"{problem} preprocessed dataset {dataset} in {root}.{listing} {remedy}")


def load_plans(dataset_folder: Path, name: str | None) -> dict[str, Any]:
    """Return the content of a plans file.

    Args:
        dataset_folder: the dataset's folder in `nnUNet_preprocessed`.
        name: of the plans; None: the newest that lgssl_plan_and_preprocess made.

    Raises:
        PlansError: there are none, or they are damaged.
    """
    available = _plans_files(dataset_folder)
    if name is not None:
        file = dataset_folder / f"{name}.json"
        if not file.is_file():
            names = ", ".join(path.stem for path in available) or "none"
            raise PlansError(f"There are no plans {name} in {dataset_folder}; planned with this package: {names}.")
        return _read_plans(file)
    planned = [path for path in available if not _DERIVED_BLOCKS & available[path]["lgssl"].keys()]
    if not planned:
        raise PlansError(
            f"{dataset_folder} holds no plans of lgssl_plan_and_preprocess: run it first (nnU-Net's own plans say "
            "nothing about unlabelled cases)."
        )
    newest = max(planned, key=lambda path: path.stat().st_mtime_ns)
    if len(planned) > 1:
        others = ", ".join(path.stem for path in planned if path != newest)
        logger.info("Using the newest plans, %s (others: %s; choose with -p).", newest.stem, others)
    return _read_plans(newest)


def _read_plans(file: Path) -> dict[str, Any]:
    try:
        plans = read_json(file)
    except DatasetError as error:
        raise PlansError(str(error)) from None
    require_form(plans, file)
    return plans


def planned_as(plans: Mapping[str, Any]) -> str:
    """Return the name under which the plans were planned, before options of a run were added to it."""
    return plans["lgssl"].get("training", {}).get("planned_as", plans["plans_name"])


def training_seed(plans: Mapping[str, Any]) -> int:
    """Return the training seed of the plans."""
    return int(plans["lgssl"].get("training", {}).get("seed", 0))


def training_iterations(plans: Mapping[str, Any]) -> int:
    """Return the number of training iterations that the plans' schedule asks for."""
    schedule = plans["lgssl"]["schedule"]
    return schedule["num_epochs"] * schedule["iterations_per_epoch"]


def _plans_files(dataset_folder: Path) -> dict[Path, dict[str, Any]]:
    """Return the content of the plans files with an lgssl block, by file."""
    contents = {path: read_json_if_valid(path) for path in sorted(dataset_folder.glob("*.json"))}
    return {
        path: content
        for path, content in contents.items()
        if isinstance(content, dict) and isinstance(content.get("lgssl"), dict) and "configurations" in content
    }
