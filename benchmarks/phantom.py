"""Choices of LG-SSL compared on the phantom: six labelled and 24 unlabelled cases, 24 test cases, 400 iterations.

    python benchmarks/phantom.py SupervisedTrainer LGSSLTrainer LGSSLTrainer:gate_start=0 --seeds 0 1

Each cell trains with LGSSLPlannerCPU's schedule and predicts with the last checkpoint. Finished cells are skipped; each
leaves a JSON file under --output. The phantom is the same for every training seed. It is a made-up image: it screens
choices cheaply, and a gain here is a reason to measure on real images, not a result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lgssl_nnunet
from lgssl_nnunet.files import environment, write_json
from lgssl_nnunet.paths import VARIABLES
from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset

SPEC = PhantomSpec(shape=(24, 32, 32), num_labeled=6, num_unlabeled=24, num_test=24)
EPOCHS = 10


def run_cell(cell: str, seed: int, iterations: int, output: Path) -> dict:
    trainer, _, settings = cell.partition(":")
    model = lgssl_nnunet.train(
        SPEC.dataset_id,
        "3d_fullres",
        trainer,
        epochs=EPOCHS,
        iterations_per_epoch=iterations // EPOCHS,
        seed=seed,
        hyperparameters=dict(setting.split("=", 1) for setting in settings.split(",") if setting),
        continue_training=True,
    )
    (dataset,) = (output / "nnUNet_raw").iterdir()
    prediction = output / "predictions" / model.name
    lgssl_nnunet.predict(dataset / "imagesTs", prediction, model_folder=model, overwrite=True)
    result = lgssl_nnunet.evaluate(dataset / "labelsTs", prediction, num_processes=0)
    return {"cell": cell, "seed": seed, "dice": {mean.name: float(mean.dice) for mean in result["classes"]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", metavar="TRAINER[:name=value,...]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path("benchmark_results/phantom"))
    args = parser.parse_args()
    output = args.output.resolve()
    rows = []
    with environment({name: str(output / name) for name in VARIABLES}):
        if not (output / "nnUNet_raw").is_dir():
            write_phantom_dataset(output / "nnUNet_raw", SPEC)
        lgssl_nnunet.plan_and_preprocess([SPEC.dataset_id], planner="LGSSLPlannerCPU", configurations=["3d_fullres"])
        for cell in args.cells:
            for seed in args.seeds:
                file = output / f"{cell.replace(':', '_').replace(',', '_')}_s{seed}_i{args.iterations}.json"
                if not file.is_file():
                    write_json(run_cell(cell, seed, args.iterations, output), file)
                rows.append(json.loads(file.read_text()))
    print("| cell | seed | " + " | ".join(rows[0]["dice"]) + " | mean |")
    for row in rows:
        dice = [100 * value for value in row["dice"].values()]
        print(
            f"| {row['cell']} | {row['seed']} | "
            + " | ".join(f"{v:.1f}" for v in [*dice, sum(dice) / len(dice)])
            + " |"
        )


if __name__ == "__main__":
    main()
