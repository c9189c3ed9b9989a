"""Memory of lgssl_predict against nnUNetv2_predict on a large CT with many classes, made up.

    python benchmarks/prediction_memory.py
    python benchmarks/prediction_memory.py --shape 150 256 256

An untrained network of LGSSLPlannerCPU at 4 mm keeps the sliding window short; the way back to the image's grid, where
all classes meet the full resolution, is that of a real model. prediction.py then runs both commands.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from generated_ct import ct, write_ct_dataset, write_volume

import lgssl_nnunet
from lgssl_nnunet.files import environment
from lgssl_nnunet.paths import VARIABLES

DATASET_ID = 902
SMALL = (40, 96, 96)
SPACING = (4.0, 4.0, 4.0)


def untrained_model(folder: Path, classes: int) -> Path:
    """Return the folder of a model that has been trained for one step, with nnU-Net's three folders under `folder`."""
    with environment({variable: str(folder / variable) for variable in VARIABLES}):
        write_ct_dataset(folder / "nnUNet_raw" / f"Dataset{DATASET_ID}_GeneratedCT", 2, SMALL, classes)
        lgssl_nnunet.plan_and_preprocess(
            DATASET_ID,
            planner="LGSSLPlannerCPU",
            configurations=("3d_fullres",),
            overwrite_target_spacing=SPACING,
            num_processes=0,
            num_processes_fingerprint=0,
            progress=False,
        )
        return lgssl_nnunet.train(
            DATASET_ID,
            "3d_fullres",
            "SupervisedTrainer",
            epochs=1,
            iterations_per_epoch=1,
            device="cpu",
            progress=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = untrained_model(Path(scratch), args.classes)
        images = Path(scratch, "images")
        write_volume(ct(args.shape, args.classes, seed=0)[0], images / "case_0000.nii.gz")
        script = Path(__file__).with_name("prediction.py")
        options = ["--only", "auto", "--rounds", str(args.rounds), "--options", "--disable_tta"]
        subprocess.run([sys.executable, str(script), str(model), str(images), *options], check=True)


if __name__ == "__main__":
    main()
