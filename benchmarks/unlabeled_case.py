"""What an unlabelled case costs in preprocessing and on the disk, against the same case with its label.

    export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/unlabeled_case.py 501 --plans LGSSLCPUPlans_labeled4 --cases 6 --rounds 3

Labelled cases of the plans are preprocessed and stored into a temporary folder, with and without their label, in turns:
processor time of reading, preprocessing and storing, and the bytes of the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from lgssl_nnunet.plans.cases import Case, load_raw_dataset
from lgssl_nnunet.plans.preprocessing import CaseFolders, CaseSteps, preprocess_case


def run(case: Case, steps: CaseSteps, root: Path) -> tuple[float, int]:
    """Return processor seconds and bytes of one case."""
    folders = CaseFolders.of(root, "cases")
    for folder in (folders.labeled, folders.unlabeled, folders.unfinished):
        folder.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    written = preprocess_case(case, folders, steps)
    return time.process_time() - start, sum(record["size"] for record in written.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="dataset id in nnUNet_raw")
    parser.add_argument("--plans", required=True)
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    preprocessed = next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(args.dataset):03d}_*"))
    plans = json.loads((preprocessed / f"{args.plans}.json").read_text(encoding="utf-8"))
    dataset = load_raw_dataset(int(args.dataset))
    steps = CaseSteps.of(plans, args.configuration, dataset.dataset_json, verbose=False)
    labeled = [case for case in dataset.cases.values() if case.label is not None][: args.cases]
    forms = {"labelled": lambda case: case, "unlabelled": lambda case: dataclasses.replace(case, label=None)}
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in forms}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(args.rounds):
            for case in labeled:
                for name in list(forms)[:: 1 if turn % 2 == 0 else -1]:
                    measured[name].append(run(forms[name](case), steps, Path(scratch)))
    print("| case | seconds | ratio (range) | bytes, ratio |\n| --- | --- | --- | --- |")
    for name, values in measured.items():
        ratios = sorted(own[0] / other[0] for own, other in zip(values, measured["labelled"], strict=True))
        seconds, ratio = statistics.median(value[0] for value in values), statistics.median(ratios)
        size = sum(value[1] for value in values) / sum(value[1] for value in measured["labelled"])
        print(f"| {name} | {seconds:.2f} | {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {size:.2f} |")


if __name__ == "__main__":
    main()
