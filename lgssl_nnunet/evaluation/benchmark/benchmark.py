"""Methods against each other on several datasets, budgets and seeds: the function behind `lgssl_benchmark`."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.evaluation.benchmark.cell_steps import Execution
from lgssl_nnunet.evaluation.benchmark.cells import Cell, cell_from_identity, method_label, parse_method
from lgssl_nnunet.evaluation.benchmark.cluster import CLUSTERS, require_submitit, run_on_cluster
from lgssl_nnunet.evaluation.benchmark.grid import GridRequest, build_grid
from lgssl_nnunet.evaluation.benchmark.plots import draw_plots
from lgssl_nnunet.evaluation.benchmark.records import CellStore
from lgssl_nnunet.evaluation.benchmark.results import Results, load_results
from lgssl_nnunet.evaluation.benchmark.tables import write_tables
from lgssl_nnunet.evaluation.benchmark.worker import Job, work
from lgssl_nnunet.evaluation.benchmark.workers import divided_cores, run_workers
from lgssl_nnunet.inference.models import BASELINE
from lgssl_nnunet.paths import data_folders, use_data_folders

logger = logging.getLogger(__name__)

DEFAULT_TRAINERS = (BASELINE, "LGSSLTrainer")


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark left.

    Attributes:
        folder: the benchmark folder.
        files: tables by file name.
        plots: pictures.
        unfinished: the cells of this call without a result, and why.
    """

    folder: Path
    files: dict[str, Path]
    plots: list[Path]
    unfinished: dict[Cell, str]


def benchmark(
    datasets: Sequence[int | str] = (),
    trainers: Sequence[str] = DEFAULT_TRAINERS,
    budgets: Sequence[int | str] = ("all",),
    seeds: Sequence[int] = (0, 1, 2),
    *,
    iterations: int | None = None,
    configuration: str = "3d_fullres",
    planner: str = "LGSSLPlanner",
    overwrite_target_spacing: Sequence[float] | None = None,
    output: Path | str | None = None,
    reference: str = BASELINE,
    workers: int = 1,
    cluster: str | None = None,
    cluster_options: Mapping[str, Any] | None = None,
    device: Any = None,
    num_processes: int | None = None,
    tables_only: bool = False,
    command: str | None = None,
    progress: bool = True,
) -> BenchmarkResult:
    """Plan, train, predict and evaluate every cell that is not finished, and draw tables and plots of all that are.

    A cell is a dataset, method, budget and seed. Models lie where `train` puts them: finished ones are taken over,
    interrupted ones continued. A cell that fails is recorded and tried again by the next call. The tables hold every
    cell of the folder, also those of earlier calls.

    Args:
        datasets: ids or names of datasets with imagesTs and labelsTs.
        trainers: methods, "Trainer" or "Trainer:name=value,name=value" with hyper-parameters.
        budgets: numbers of labelled cases, or "all": the baseline with all labels, and the other methods if the
            dataset has unlabelled cases.
        seeds: each draws the labelled cases and seeds the training, the same for all methods.
        iterations: optimiser steps of each training; None as planned.
        configuration: "2d", "3d_fullres" or "3d_lowres".
        planner: a name of `lgssl_nnunet.plans.planner.PLANNERS`.
        overwrite_target_spacing: three spacings in mm (z y x) for 3d_fullres.
        output: the benchmark folder; by default `benchmark` in nnUNet_results.
        reference: the method against which the others are tested.
        workers: worker processes, each with its share of the cores; with several GPUs each takes one. 0 works in this
            process. With `cluster` the number of jobs.
        cluster: "slurm", or "local" for jobs on this machine; None for worker processes.
        cluster_options: submitit's parameters by name, such as timeout_min or slurm_partition.
        device: torch device or its name; None chooses.
        num_processes: processes of each worker for preprocessing, prediction and evaluation; 0 for none; None: its
            share of the cores, at most 8.
        tables_only: only draw tables and plots of what is there.
        command: the command line for the records; None takes this process's.
        progress: show progress bars.

    Returns:
        Where everything lies, and which cells of this call have no result.

    Raises:
        UsageError: arguments that cannot work, all named before anything runs.
        MissingDependencyError: `cluster` without submitit.
        LGSSLError: workers could not be started, or a job of the cluster ended with an error.
    """
    use_data_folders()
    folder = Path(output).expanduser() if output else data_folders()["nnUNet_results"].path / "benchmark"
    reference = method_label(*parse_method(reference))
    cells: list[Cell] = []
    if tables_only:
        _require_cells(folder)
    else:
        _check_workers(workers, cluster)
        spacing = None if overwrite_target_spacing is None else tuple(map(float, overwrite_target_spacing))
        cells = build_grid(
            GridRequest(datasets, trainers, budgets, seeds, iterations, configuration, planner, spacing)
        )  # fmt: skip
        variables = {name: str(entry.path.resolve()) for name, entry in data_folders().items()}
        if cluster is None and workers:
            variables |= divided_cores(workers)
        job = Job(
            folder=folder.resolve(),
            cells=tuple(cells),
            execution=Execution(device, _processes(num_processes, workers), progress and workers == 0),
            session=uuid.uuid4().hex,
            command=command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            variables=tuple(variables.items()),
        )
        _run(job, workers, cluster, cluster_options or {}, progress)
    results = load_results(folder)
    files, plots = write_tables(results, folder, reference), draw_plots(results, folder / "plots")
    return BenchmarkResult(folder, files, plots, _unfinished(folder, cells, results))


def _run(job: Job, workers: int, cluster: str | None, options: Mapping[str, Any], progress: bool) -> None:
    finished = [cell for cell in job.cells if _is_finished(job.folder, cell)]
    logger.info("%d cells, %d of them finished already. Folder: %s", len(job.cells), len(finished), job.folder)
    if len(finished) == len(job.cells):
        return
    if cluster is not None:
        run_on_cluster(job, workers, cluster, options, progress)
    elif workers == 0:
        work(job)
    else:
        run_workers(job, workers, progress)


def _is_finished(folder: Path, cell: Cell) -> bool:
    store = CellStore(folder, cell)
    return store.is_intact(store.read())


def _unfinished(folder: Path, cells: Sequence[Cell], results: Results) -> dict[Cell, str]:
    """Return the cells that are not among the results, whose files were hashed when they were loaded."""
    finished = {cell_from_identity(record["cell"]) for record in results.records}
    left = [cell for cell in cells if cell not in finished]
    return {cell: (CellStore(folder, cell).read() or {}).get("error", "not finished") for cell in left}


def _require_cells(folder: Path) -> None:
    if not (folder / "cells").is_dir():
        raise UsageError(f"{folder} holds no benchmark: name its folder with -o, or leave --tables_only out.")


def _check_workers(workers: int, cluster: str | None) -> None:
    if workers < 0 or (cluster is not None and workers < 1):
        raise UsageError(f"--workers {workers}: give a number of workers (0, not with --cluster: in this process).")
    if cluster is not None:
        if cluster not in CLUSTERS:
            raise UsageError(f"--cluster {cluster}: give {' or '.join(CLUSTERS)}.")
        require_submitit()


def _processes(number: int | None, workers: int) -> int:
    if number is not None:
        return number
    return max(1, min(8, (os.cpu_count() or 1) // max(1, workers)))
