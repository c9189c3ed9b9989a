"""`lgssl_benchmark`: methods against each other on datasets, budgets and seeds."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from lgssl_nnunet.cli.common import add_common_arguments, command_parser, run_command, split_settings

_DESCRIPTION = """\
Plan, train, predict and evaluate every combination of dataset, method, budget and seed, then write tables and plots.

Finished cells are skipped, finished models of lgssl_train taken over, interrupted trainings continued; a cell that
fails does not stop the rest. The datasets need imagesTs and labelsTs, which only prediction and evaluation read."""

_EXAMPLES = """\
examples:
  lgssl_benchmark -d 510 --budgets 4 8 all -pl LGSSLPlannerCPU --workers 2
  lgssl_benchmark -d 510 501 --trainers SupervisedTrainer LGSSLTrainer LGSSLTrainer:prompt_mode=none --budgets 4 all
  lgssl_benchmark -d 501 --budgets 8 --workers 16 --cluster slurm --cluster_options timeout_min=600 gpus_per_node=1
  lgssl_benchmark --tables_only --reference LGSSLTrainer

exit status: 0 done, 1 cells failed (they are named; the next call tries them again), 2 wrong use or data"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = command_parser("lgssl_benchmark", _DESCRIPTION, _EXAMPLES)
    _add_grid_arguments(parser)
    _add_work_arguments(parser)
    add_common_arguments(parser)
    return parser


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cells")
    group.add_argument("-d", nargs="+", default=[], metavar="DATASET", help="dataset ids or names, such as 510 501")
    group.add_argument(
        "--trainers",
        nargs="+",
        default=["SupervisedTrainer", "LGSSLTrainer"],
        metavar="TRAINER[:NAME=VALUE,...]",
        help="methods, with hyper-parameters after a colon (default: SupervisedTrainer LGSSLTrainer)",
    )
    group.add_argument(
        "--budgets",
        nargs="+",
        default=["all"],
        metavar="N",
        help="numbers of labelled cases; all: SupervisedTrainer on every label, the upper bound (default: all)",
    )
    group.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="S",
        help="each draws the labelled cases and starts the training, the same for all methods (default: 0 1 2)",
    )
    group.add_argument("--iterations", type=int, metavar="N", help="optimiser steps per training (default: as planned)")
    group.add_argument(
        "-c", default="3d_fullres", metavar="CONFIGURATION", help="2d, 3d_fullres or 3d_lowres (default: 3d_fullres)"
    )
    group.add_argument("-pl", default="LGSSLPlanner", metavar="PLANNER", help="planner class (default: LGSSLPlanner)")
    group.add_argument(
        "-overwrite_target_spacing",
        "--overwrite_target_spacing",
        nargs="+",
        type=float,
        metavar="MM",
        help="three spacings in mm (z y x) for 3d_fullres (default: chosen from the images)",
    )


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work and results")
    group.add_argument("-o", metavar="FOLDER", help="benchmark folder (default: benchmark in nnUNet_results)")
    group.add_argument(
        "--reference",
        default="SupervisedTrainer",
        metavar="TRAINER",
        help="method against which the others are tested (default: SupervisedTrainer)",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the cells and the cores; 0: work in this process (default: 1)",
    )
    group.add_argument(
        "--cluster", metavar="NAME", help="run the workers as jobs: slurm, or local for this machine (default: none)"
    )
    group.add_argument(
        "--cluster_options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="submitit's parameters, such as timeout_min=600 slurm_partition=gpu (default: timeout_min=1440)",
    )
    group.add_argument(
        "-device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps (default: chosen, one GPU per worker)"
    )
    group.add_argument(
        "-np", type=int, metavar="N", help="processes per worker beside the training; 0: none (default: its cores)"
    )
    group.add_argument("--tables_only", action="store_true", help="only write tables and plots of what is finished")
    group.add_argument("--no_pbar", action="store_true", help="no progress bars, for log files (default: off)")


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Return name to value from NAME=VALUE words, whole numbers as such.

    Raises:
        UsageError: a word without "=".
    """
    options = split_settings(words, "--cluster_options takes NAME=VALUE")
    return {name: int(value) if value.isdecimal() else value for name, value in options.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    command = shlex.join(["lgssl_benchmark", *(sys.argv[1:] if argv is None else argv)])
    return run_command(lambda: _run(arguments, command), arguments)


def _run(arguments: argparse.Namespace, command: str) -> int:
    from lgssl_nnunet.evaluation.benchmark.benchmark import benchmark

    result = benchmark(
        arguments.d,
        arguments.trainers,
        arguments.budgets,
        arguments.seeds,
        iterations=arguments.iterations,
        configuration=arguments.c,
        planner=arguments.pl,
        overwrite_target_spacing=arguments.overwrite_target_spacing,
        output=arguments.o,
        reference=arguments.reference,
        workers=arguments.workers,
        cluster=arguments.cluster,
        cluster_options=parse_options(arguments.cluster_options),
        device=arguments.device,
        num_processes=arguments.np,
        tables_only=arguments.tables_only,
        command=command,
        progress=not arguments.no_pbar,
    )
    print(result.files["results.md"].read_text(encoding="utf-8"))
    print("Written: " + ", ".join(str(file) for file in [*result.files.values(), *result.plots]))
    for cell, reason in result.unfinished.items():
        print(f"No result: {cell}: {reason}")
    return 1 if result.unfinished else 0


if __name__ == "__main__":
    raise SystemExit(main())
