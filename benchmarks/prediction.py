"""Time, memory and agreement of lgssl_predict against nnUNetv2_predict: same model, images and number of processes.

    export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/prediction.py MODEL_FOLDER IMAGES --references LABELS --rounds 3
    python benchmarks/prediction.py MODEL_FOLDER IMAGES --options --disable_tta --only stock auto

Both commands run as a user runs them, start-up included, in turns; measuring.py says how time and memory are read. The
ratio is the median over rounds of stock's seconds by the form's. Voxels that differ and Dice are those of the last
round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from measuring import HEADER, Form, in_turns, measure

from lgssl_nnunet.installation import ext_trainer_path

FORMS = {"stock": None, "auto": "auto", "fp32": "fp32", "lgssl stock": "stock"}


def command(form: Form, args: argparse.Namespace) -> list[str]:
    """Return the command line of a form; the options are written the same in both commands."""
    words = ["-i", str(args.images), "-o", str(form.output), "-f", "all", "-device", args.device]
    words += ["-npp", str(args.processes), "-nps", str(args.processes), "--disable_progress_bar", *args.options]
    if FORMS[form.name] is None:
        return ["nnUNetv2_predict_from_modelfolder", "-m", str(args.model), *words]
    return ["lgssl_predict", "-m", str(args.model), "--precision", FORMS[form.name], *words]


def run(form: Form, args: argparse.Namespace) -> None:
    """Predict into an empty folder and note seconds and memory."""
    shutil.rmtree(form.output, ignore_errors=True)
    measure(form, command(form, args), {"nnUNet_extTrainer": str(ext_trainer_path())})


def segmentations(folder: Path, ending: str) -> dict[str, np.ndarray]:
    files = sorted(folder.glob(f"*{ending}"))
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files}


def equal_voxels(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the share of equal voxels over all cases."""
    return sum(int((one[name] == other[name]).sum()) for name in one) / sum(mask.size for mask in one.values())


def dice(masks: dict[str, np.ndarray], references: dict[str, np.ndarray]) -> list[float]:
    """Return the mean Dice over the cases, per label."""
    values = []
    for label in sorted(set(np.unique(np.concatenate([np.unique(mask) for mask in references.values()]))) - {0}):
        pairs = [(masks[name] == label, reference == label) for name, reference in references.items()]
        values.append(statistics.mean(2 * (a & b).sum() / max(a.sum() + b.sum(), 1) for a, b in pairs))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder with fold_all")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--references", type=Path, help="folder of reference segmentations, for Dice")
    parser.add_argument(
        "--only", nargs="+", default=list(FORMS), choices=list(FORMS), help="forms; stock is always run"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="-npp and -nps of both commands")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of both commands")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    ending = json.loads((args.model / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    with tempfile.TemporaryDirectory() as scratch:
        forms = [Form(name, Path(scratch) / name.replace(" ", "_")) for name in FORMS if name in {"stock", *args.only}]
        in_turns(forms, args.rounds, lambda form: run(form, args))
        masks = {form.name: segmentations(form.output, ending) for form in forms}
        references = segmentations(args.references, ending) if args.references else {}
        references = {name: mask for name, mask in references.items() if name in masks["stock"]}
    print(f"| {HEADER} | equal voxels | Dice per label |")
    print("|" + " --- |" * 7)
    for form in forms:
        equal = equal_voxels(masks["stock"], masks[form.name])
        values = " ".join(f"{value:.4f}" for value in dice(masks[form.name], references)) if references else "-"
        print(f"| {form.row(forms[0])} | {100 * equal:.4f} % | {values} |")


if __name__ == "__main__":
    main()
