"""What one cell of a benchmark does: plan, train, predict the test cases, evaluate.

The rules of a fair comparison are kept here. Planning and training are given the dataset by name and never a path to
imagesTs or labelsTs; imagesTs is read by the search for twins (which refuses a scan that is also in training) and by
prediction, labelsTs by evaluation alone. The model is the last checkpoint of a training on every labelled case of the
budget, and its segmentations are evaluated as they are. Methods with the same dataset, budget and seed share one plans
file, hence cases, patches, augmentation and schedule; the seed draws the cases and starts the training.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.evaluation.benchmark.cells import Cell
from lgssl_nnunet.evaluation.benchmark.provenance import training_seconds
from lgssl_nnunet.files import read_json
from lgssl_nnunet.inference.models import FINAL_CHECKPOINT
from lgssl_nnunet.locks import hold_lock, lock_beside
from lgssl_nnunet.paths import data_folders

logger = logging.getLogger(__name__)

FOLD = "all"


@dataclass(frozen=True)
class Execution:
    """How cells are computed, which does not decide their results.

    Attributes:
        device: torch device or its name; None chooses.
        num_processes: worker processes for preprocessing, prediction and evaluation; 0 for none.
        progress: show the progress bar of each step.
    """

    device: Any = None
    num_processes: int = 1
    progress: bool = False


@dataclass
class StepTimes:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Announce a step and time it."""
        logger.info("--- %s", step)
        start = time.monotonic()
        yield
        self.seconds[step] = round(time.monotonic() - start, 1)


def run_cell(cell: Cell, prediction: Path, execution: Execution) -> dict[str, Any]:
    """Plan, train, predict and evaluate; finished steps of an earlier run are used as far as they are up to date.

    Args:
        cell: what to do.
        prediction: folder for the segmentations and their evaluation; replaced if it exists.
        execution: how to do it.

    Returns:
        What goes into the record: plans, labelled cases, model, seconds per step, classes.

    Raises:
        LGSSLError: a step refused or failed.
    """
    times = StepTimes()
    with times("plan"):
        plans = plan(cell, execution)
    with times("train"):
        model, adopted = train_or_adopt(cell, plans, execution)
    with times("predict"):
        predict_test_cases(cell, model, prediction, execution)
    with times("evaluate"):
        dice = evaluate_test_cases(cell, prediction, execution)
    split = plans["lgssl"]["split"]
    return {
        "plans": plans["plans_name"],
        "labeled": split["labeled"],
        "unlabeled": len(split["unlabeled"]),
        "test": split["test"],
        "model": f"{cell.dataset}/{model.name}/fold_{FOLD}/{FINAL_CHECKPOINT}",
        "adopted": adopted,
        "training_seconds": training_seconds(model / f"fold_{FOLD}" / FINAL_CHECKPOINT),
        "seconds": times.seconds,
        "dice": dice,
    }


def plan(cell: Cell, execution: Execution) -> dict[str, Any]:
    """Plan and preprocess the cell's budget, one process at a time per dataset, and return the plans.

    Raises:
        DatasetError: a test case is among the training cases.
    """
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    preprocessed = data_folders()["nnUNet_preprocessed"].path
    # Planning refuses a dataset that another process is planning; here it is waited for.
    folder = preprocessed / cell.dataset
    with hold_lock(lock_beside(folder, "planning"), folder, wait=True):
        (file,) = plan_and_preprocess(
            [cell.dataset],
            planner=cell.planner,
            labeled=cell.budget,
            seed=0 if cell.budget is None else cell.seed,  # all cases: nothing is drawn
            configurations=[cell.configuration],
            overwrite_target_spacing=cell.spacing,
            overwrite_plans_name=_plans_name(cell),
            num_processes=execution.num_processes,
            num_processes_fingerprint=execution.num_processes,
            progress=execution.progress,
        )
    plans = read_json(file)
    split = plans["lgssl"]["split"]
    seen = sorted({*split["labeled"], *split["unlabeled"]} & set(split["test"]))
    if seen:
        raise DatasetError(f"{cell.dataset}: {', '.join(seen)} are in imagesTs and in training; remove one of the two.")
    return plans


def _plans_name(cell: Cell) -> str | None:
    """Return a name with the spacing in it, so that plans of two spacings do not replace each other; else None."""
    if cell.spacing is None:
        return None
    from lgssl_nnunet.plans.cases import load_raw_dataset
    from lgssl_nnunet.plans.planner import find_planner
    from lgssl_nnunet.plans.splits import choose_budget

    seed = 0 if cell.budget is None else cell.seed
    budget = choose_budget(load_raw_dataset(cell.dataset), labeled=cell.budget, seed=seed)
    spacing = "x".join(f"{length:g}" for length in cell.spacing)
    return f"{find_planner(cell.planner).plans_prefix}{budget.name}_sp{spacing}"


def train_or_adopt(cell: Cell, plans: Mapping[str, Any], execution: Execution) -> tuple[Path, bool]:
    """Train the cell's model, continue it, or take over the finished one that is there.

    Returns:
        The model folder, and whether its training had been finished before.

    Raises:
        CheckpointError: the model folder holds a model of other plans.
    """
    from lgssl_nnunet.training import train, trained_model_folder

    epochs, iterations_per_epoch = divide_iterations(cell.iterations, plans["lgssl"]["schedule"])
    options: dict[str, Any] = {
        "plans": plans["plans_name"],
        "epochs": epochs,
        "iterations_per_epoch": iterations_per_epoch,
        "seed": cell.seed,
        "hyperparameters": dict(cell.settings),
    }
    folder = trained_model_folder(cell.dataset, cell.configuration, cell.trainer, **options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Another benchmark may be training the same model: wait for it, then take over what it made.
    with hold_lock(folder.with_name(f".{folder.name}.lock"), folder, wait=True):
        if (folder / f"fold_{FOLD}" / FINAL_CHECKPOINT).is_file():
            logger.info("%s is trained already.", folder.name)
            return folder, True
        train(
            cell.dataset,
            cell.configuration,
            cell.trainer,
            fold=FOLD,
            continue_training=True,
            device=execution.device,
            progress=None if execution.progress else False,
            **options,
        )
    return folder, False


def divide_iterations(iterations: int, schedule: Mapping[str, Any]) -> tuple[int, int]:
    """Return epochs and iterations per epoch whose product is exactly `iterations`.

    Of all ways to divide them it is the one whose epochs are nearest in length to the planned ones; a planned number of
    iterations is divided as planned.
    """
    planned = schedule["iterations_per_epoch"]
    divisors = [length for length in range(1, iterations + 1) if iterations % length == 0]
    length = min(divisors, key=lambda divisor: max(divisor / planned, planned / divisor))
    return iterations // length, length


def predict_test_cases(cell: Cell, model: Path, prediction: Path, execution: Execution) -> None:
    """Segment imagesTs with the last checkpoint, into an empty folder."""
    from lgssl_nnunet.inference.predict import predict

    if prediction.exists():
        shutil.rmtree(prediction)
    predict(
        _raw_folder(cell) / "imagesTs",
        prediction,
        model_folder=model,
        folds=[FOLD],
        checkpoint=FINAL_CHECKPOINT,
        num_processes_preprocessing=execution.num_processes,
        num_processes_segmentation_export=execution.num_processes,
        precision="stock",  # the same on every machine, whatever auto chooses
        device=execution.device,
        progress=execution.progress,
    )


def evaluate_test_cases(cell: Cell, prediction: Path, execution: Execution) -> float:
    """Compare the segmentations with labelsTs and return the mean Dice over the classes."""
    from lgssl_nnunet.evaluation.evaluate import evaluate

    result = evaluate(
        _raw_folder(cell) / "labelsTs",
        prediction,
        num_processes=execution.num_processes,
        progress=execution.progress,
    )
    return float(result["dice"])


def _raw_folder(cell: Cell) -> Path:
    return data_folders()["nnUNet_raw"].path / cell.dataset
