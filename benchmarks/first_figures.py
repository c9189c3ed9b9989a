"""Trainers at a small label budget, one seed: the figures of RESULTS.md.

    export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/first_figures.py 510 --cells SupervisedTrainer:4 LGSSLTrainer:4 SupervisedTrainer:all
    python benchmarks/first_figures.py 501 --spacing 1.25 1.25 1.25 --cells SupervisedTrainer:4 ...

Every cell plans with LGSSLPlannerCPU (1,000 iterations), trains on all labelled cases of its budget, predicts imagesTs
with the last checkpoint and scores against labelsTs, which nothing else reads. Finished cells are skipped. Each
cell leaves a JSON file under --output; the table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import lgssl_nnunet
from lgssl_nnunet.files import write_json


def run_cell(dataset: Path, trainer: str, budget: str, args: argparse.Namespace) -> dict:
    labeled = None if budget == "all" else int(budget)
    plans_file = lgssl_nnunet.plan_and_preprocess(
        [dataset.name],
        planner="LGSSLPlannerCPU",
        labeled=labeled,
        configurations=["3d_fullres"],
        overwrite_target_spacing=args.spacing,
    )[0]
    start = time.perf_counter()
    # The baseline has no hyper-parameters; a method that does not know one of these refuses it.
    options = {} if trainer == "SupervisedTrainer" else dict(setting.split("=", 1) for setting in args.set)
    model = lgssl_nnunet.train(
        dataset.name,
        "3d_fullres",
        trainer,
        plans=plans_file.stem,
        seed=args.seed,
        hyperparameters=options,
        iterations_per_epoch=args.iterations_per_epoch,
        continue_training=True,
    )
    minutes = (time.perf_counter() - start) / 60
    name = f"{dataset.name}_{model.name}"
    prediction = args.output / name
    lgssl_nnunet.predict(dataset / "imagesTs", prediction, model_folder=model, overwrite=True)
    summary = lgssl_nnunet.evaluate(dataset / "labelsTs", prediction)["summary"]
    return {
        "dataset": dataset.name,
        "model": model.name,
        "trainer": trainer,
        "labeled": budget,
        "seed": args.seed,
        "dice": {label: scores["Dice"] for label, scores in summary["mean"].items()},
        "mean dice": summary["foreground_mean"]["Dice"],
        "cases": len(summary["metric_per_case"]),
        "training minutes": round(minutes, 1),
        "versions": {package: version(package) for package in ("torch", "nnunetv2", "lgssl_nnunet")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def table(rows: list[dict]) -> str:
    labels = list(rows[0]["dice"])
    header = ["trainer", "labelled", *(f"Dice {label}" for label in labels), "mean", "training [min]"]
    lines = [" | ".join(header), " | ".join(["---"] * len(header))]
    for row in rows:
        scores = [f"{100 * row['dice'][label]:.1f}" for label in labels] + [f"{100 * row['mean dice']:.1f}"]
        lines.append(" | ".join([row["model"].split("__3d")[0], row["labeled"], *scores, str(row["training minutes"])]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="dataset id in nnUNet_raw; needs imagesTs and labelsTs")
    parser.add_argument("--cells", nargs="+", required=True, metavar="TRAINER:BUDGET")
    parser.add_argument("--spacing", nargs=3, type=float, default=None, help="-overwrite_target_spacing, mm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="hyper-parameter of every trainer but SupervisedTrainer",
    )
    parser.add_argument("--iterations_per_epoch", type=int, default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmark_results"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    dataset = next(Path(os.environ["nnUNet_raw"]).glob(f"Dataset{int(args.dataset):03d}_*"))
    rows = []
    for cell in args.cells:
        trainer, budget = cell.split(":")
        spacing = [f"sp{'x'.join(map(str, args.spacing))}"] if args.spacing else []
        length = [f"i{args.iterations_per_epoch}"] if args.iterations_per_epoch else []
        tag = "_".join([dataset.name, trainer, budget, f"s{args.seed}", *spacing, *length, *args.set]) + ".json"
        file = args.output / tag
        if not file.is_file():
            write_json(run_cell(dataset, trainer, budget, args), file)
        rows.append(json.loads(file.read_text()))
    print(table(rows))


if __name__ == "__main__":
    main()
