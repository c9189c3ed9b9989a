"""Time, memory and agreement of lgssl_plan_and_preprocess against nnUNetv2_plan_and_preprocess on labelled cases.

    python benchmarks/preprocessing.py DATASET_FOLDER --rounds 3
    python benchmarks/preprocessing.py DATASET_FOLDER --options -overwrite_target_spacing 1.25 1.25 1.25
    python benchmarks/preprocessing.py --generated 100 512 512 --classes 14 --cases 2 --rounds 1

Both commands run as a user runs them, with all configurations, start-up included, in turns, each into an empty folder;
measuring.py says how time and memory are read. Ours checks the integrity of every case besides, which nnU-Net does when
asked (`--verify`). The ratio is the median over rounds of stock's seconds by ours.

Agreement is that of the last round, over all cases of all configurations: the largest difference of a voxel as a share
of the range of stock's normalised image, and the smallest Dice of a label of a case.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
from generated_ct import write_ct_dataset
from measuring import HEADER, Form, in_turns, measure

from lgssl_nnunet.files import read_json, write_json

PLANS = {"stock": "nnUNetPlans", "ours": "LGSSLPlans"}


def stage(args: argparse.Namespace, raw: Path) -> str:
    """Put the dataset with the wanted number of cases into a raw folder, and return its id."""
    if args.generated:
        write_ct_dataset(raw / "Dataset901_GeneratedCT", args.cases or 2, args.generated, args.classes)
        return "901"
    source, target = args.dataset.resolve(), raw / args.dataset.resolve().name
    content = read_json(source / "dataset.json")
    labels = sorted((source / "labelsTr").glob(f"*{content['file_ending']}"))[: args.cases]
    for label in labels:
        case = label.name.removesuffix(content["file_ending"])
        for file in (label, *(source / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9]{content['file_ending']}")):
            link = target / file.parent.name / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    write_json({**content, "numTraining": len(labels)}, target / "dataset.json")
    return target.name[7:10]


def run(form: Form, raw: Path, dataset: str, args: argparse.Namespace) -> None:
    """Plan and preprocess into an empty folder and note seconds and memory."""
    shutil.rmtree(form.output, ignore_errors=True)
    form.output.mkdir()
    name = "nnUNetv2_plan_and_preprocess" if form.name == "stock" else "lgssl_plan_and_preprocess"
    words = ["-d", dataset, "-npfp", str(args.processes), "-np", str(args.processes), "--no_pbar", *args.options]
    verify = ["--verify_dataset_integrity"] if args.verify else []
    results = str(form.output / "results")
    folders = {"nnUNet_raw": str(raw), "nnUNet_preprocessed": str(form.output), "nnUNet_results": results}
    measure(form, [name, *words, *verify], folders)


def pairs(forms: list[Form], suffix: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the stored arrays of stock and ours, for all cases of all configurations.

    Raises:
        SystemExit: one of them lacks a case that the other has.
    """
    stock, ours = (next(form.output.glob("Dataset*")) for form in forms)
    configurations = json.loads((stock / "nnUNetPlans.json").read_text())["configurations"]
    for name, configuration in configurations.items():
        if "data_identifier" not in configuration:
            continue
        folders = stock / configuration["data_identifier"], ours / f"{PLANS['ours']}_{name}"
        names = [{file.name for file in folder.glob(f"*{suffix}")} for folder in folders]
        if names[0] != names[1]:
            raise SystemExit(f"{name}: the two sides have different cases, {sorted(names[0] ^ names[1])}")
        for file in sorted(names[0]):
            if suffix == "_seg.b2nd" or not file.endswith("_seg.b2nd"):
                yield tuple(blosc2.open(str(folder / file))[:] for folder in folders)


def largest_difference(forms: list[Form]) -> float:
    """Return the largest difference of a voxel, as a share of the range of stock's image."""
    return max(float(np.abs(one - other).max() / np.ptp(one)) for one, other in pairs(forms, ".b2nd"))


def smallest_dice(forms: list[Form]) -> float:
    """Return the smallest Dice of a label of a case, background and outside included."""
    return min(
        2 * int(((one == label) & (other == label)).sum()) / int((one == label).sum() + (other == label).sum())
        for one, other in pairs(forms, "_seg.b2nd")
        for label in np.union1d(one, other)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", help="raw dataset folder; its labelled cases are used")
    parser.add_argument("--generated", type=int, nargs=3, metavar=("Z", "Y", "X"), help="make CTs of this size instead")
    parser.add_argument("--classes", type=int, default=14, help="classes of generated CTs")
    parser.add_argument("--cases", type=int, help="number of cases (default: all; two generated ones)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="-np and -npfp of both commands")
    parser.add_argument("--verify", action="store_true", help="let nnU-Net check the integrity as well")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of both commands")
    args = parser.parse_args()
    if (args.dataset is None) == (args.generated is None):
        parser.error("give a dataset folder or --generated")
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch, "raw")
        dataset = stage(args, raw)
        forms = [Form(name, Path(scratch, name)) for name in PLANS]
        in_turns(forms, args.rounds, lambda form: run(form, raw, dataset, args))
        print(f"| {HEADER} |")
        print("|" + " --- |" * 5)
        for form in forms:
            print(f"| {form.row(forms[0])} |")
        print(f"largest difference / range: {largest_difference(forms):.1e}; smallest Dice: {smallest_dice(forms):.6f}")


if __name__ == "__main__":
    main()
