"""Cells of a benchmark that take no time: what a worker process imports in place of the real steps."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import TrainingStopped
from lgssl_nnunet.evaluation.benchmark.cell_steps import Execution
from lgssl_nnunet.evaluation.benchmark.cells import Cell
from lgssl_nnunet.evaluation.benchmark.worker import Job

FAILING, STOPPED, KILLED, SLOW = 13, 55, 66, 77
"""Seeds of cells that raise, are stopped, whose process is killed, and that take a minute beside a forked child."""

GAIN = {"SupervisedTrainer": 0.0, "LGSSLTrainer": 0.1, "PseudoLabelTrainer": 0.2}


def make_cell(seed: int = 0, trainer: str = "SupervisedTrainer", budget: int | None = 4, **changes: Any) -> Cell:
    options = {"iterations": 10, "configuration": "3d_fullres", "planner": "LGSSLPlannerCPU", **changes}
    return Cell(dataset="Dataset901_Phantom", trainer=trainer, budget=budget, seed=seed, **options)


def make_job(folder: Path, *cells: Cell, session: str = "first", **options: Any) -> Job:
    options = {"command": "lgssl_benchmark -d 901", "run": run, **options}
    return Job(folder=folder, cells=cells, execution=Execution("cpu"), session=session, **options)


def runs(folder: Path) -> list[str]:
    """The names of the cells that were begun, in order."""
    file = folder / "runs.txt"
    return file.read_text().split() if file.exists() else []


def run(cell: Cell, prediction: Path, execution: Execution) -> dict[str, Any]:
    """Leave a table of two cases and two classes instead of planning, training, predicting and evaluating."""
    with (prediction.parents[2] / "runs.txt").open("a") as file:
        file.write(f"{cell.name}\n")
    print(f"nnU-Net says something about {cell}")
    logging.getLogger("lgssl_nnunet.training").info("A step says something")
    if cell.seed == FAILING:
        raise ValueError("too many\nlayers")
    if cell.seed == STOPPED:
        raise TrainingStopped("Training stopped because of SIGTERM.")
    if cell.seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.seed == SLOW:
        os.fork()  # as a data worker, it lives on when its parent is killed
        time.sleep(60)
    time.sleep(0.2)
    shutil.rmtree(prediction, ignore_errors=True)
    prediction.mkdir(parents=True)
    dice = 0.5 + GAIN[cell.trainer] + 0.01 * cell.seed + (0.2 if cell.budget is None else 0)
    lines = ["case,key,name,dice,jaccard,n_reference,status,hd95"]
    for number, case in enumerate(("a", "007")):
        lines.append(f"{case},1,liver,{dice + 0.02 * number},0.5,100,measured,3.0")
        lines.append(f"{case},2,NA,{dice - 0.1},0.4,0,measured,")
        (prediction / f"{case}.nii.gz").write_text(f"{case} by {cell}")
    (prediction / "summary_per_case.csv").write_text("\n".join(lines) + "\n")
    labeled = [f"case_{number}" for number in range(cell.budget or 10)]
    return {
        "plans": "LGSSLCPUPlans",
        "labeled": labeled,
        "unlabeled": 10 - len(labeled),
        "test": ["007", "a"],
        "model": f"{cell.dataset}/model/fold_all/checkpoint_final.pth",
        "adopted": False,
        "training_seconds": 90.0,
        "seconds": {"plan": 1.0, "train": 2.0},
        "dice": dice - 0.04,
    }
