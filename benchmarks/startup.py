"""What 10,000 unlabelled cases add to the start of a training: time and memory of a run of one step.

    python benchmarks/startup.py --rounds 3

The dataset is a small phantom; `few` has one unlabelled case, `many` has links to its preprocessed files under other
names. Both run lgssl_train from the command line to the end of its only step, in turns; measuring.py says how time and
memory are read. Planning is not part of it: it reads every image once, and its time grows with their number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from measuring import HEADER, Form, in_turns, measure

import lgssl_nnunet
from lgssl_nnunet.files import environment, read_json, write_json
from lgssl_nnunet.paths import VARIABLES
from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset

SPEC = PhantomSpec(shape=(24, 32, 32), num_labeled=3, num_unlabeled=1, num_test=1)
PLANS, CONFIGURATION = "LGSSLCPUPlans", "3d_fullres"


def plan(folder: Path) -> None:
    """Plan and preprocess the phantom in nnU-Net's three folders under `folder`."""
    with environment(variables(folder)):
        write_phantom_dataset(folder / "nnUNet_raw", SPEC)
        lgssl_nnunet.plan_and_preprocess(
            SPEC.dataset_id,
            planner="LGSSLPlannerCPU",
            configurations=(CONFIGURATION,),
            num_processes=0,
            num_processes_fingerprint=0,
            progress=False,
        )


def variables(folder: Path) -> dict[str, str]:
    return {variable: str(folder / variable) for variable in VARIABLES}


def multiply(folder: Path, number: int) -> None:
    """Add unlabelled cases to the plans, to the manifest and, as links, to the preprocessed ones."""
    (preprocessed,) = (folder / "nnUNet_preprocessed").glob("Dataset*")
    plans_file = preprocessed / f"{PLANS}.json"
    manifest_file = preprocessed / f"{PLANS}_{CONFIGURATION}.manifest.json"
    plans, manifest = read_json(plans_file), read_json(manifest_file)
    split = plans["lgssl"]["split"]
    (original,) = split["unlabeled"]
    names = [f"more_{index:06d}" for index in range(number)]
    for name in names:
        for suffix in (".b2nd", ".pkl"):
            cases = preprocessed / f"{PLANS}_{CONFIGURATION}_unlabeled"
            os.link(cases / f"{original}{suffix}", cases / f"{name}{suffix}")
        manifest[name] = manifest[original]
    split["unlabeled"] = sorted([original, *names])
    write_json(plans, plans_file)
    write_json(manifest, manifest_file)


def run(form: Form, iterations: int) -> None:
    """Train for a few steps from scratch and note seconds and memory."""
    shutil.rmtree(form.output / "nnUNet_results", ignore_errors=True)
    words = [str(SPEC.dataset_id), CONFIGURATION, "LGSSLTrainer", "--epochs", "1", "-device", "cpu", "--no_pbar"]
    length = ["--iterations_per_epoch", str(iterations), "--disable_checkpointing"]
    measure(form, ["lgssl_train", *words, *length], variables(form.output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="unlabelled cases that are added")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=1, help="steps of each run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        forms = [Form(name, Path(scratch, name)) for name in ("few", "many")]
        for form in forms:
            plan(form.output)
        multiply(forms[1].output, args.cases)
        in_turns(forms, args.rounds, lambda form: run(form, args.iterations))
    few, many = forms
    print(f"| {HEADER} |")
    print("|" + " --- |" * 5)
    for form in forms:
        print(f"| {form.row(few)} |")
    more = [theirs - own for own, theirs in zip(few.seconds, many.seconds, strict=True)]
    print(f"seconds more: {statistics.median(more):.1f} ({min(more):.1f} to {max(more):.1f})")


if __name__ == "__main__":
    main()
