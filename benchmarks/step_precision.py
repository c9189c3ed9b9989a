"""A training step on labelled patches in the precision chosen here, against fp32 and against nnU-Net's own step.

    export nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/step_precision.py 510 --plans LGSSLCPUPlans_labeled4 --steps 5 --rounds 7

SupervisedTrainer as it is (bf16 on CPUs that have it), SupervisedTrainer in fp32, and nnUNetTrainer, which switches
autocast off on a CPU; on the same plans and batches. The forms take turns, forwards in one round and backwards in the
next; a ratio is the median over rounds of the ratio of medians within a round. A step is all of `train_step`, without
the loader. Nothing is written to nnUNet_results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from step_cost import Subject, argument_parser, parse, prepare, timed

from lgssl_nnunet.files import environment

TRAINER = "SupervisedTrainer"


def stock_step(subject: Subject, args: argparse.Namespace) -> Callable[[int], dict]:
    """Return nnU-Net's own step on the batches of a subject."""
    plans = json.loads((args.folder / f"{args.plans}.json").read_text(encoding="utf-8")) | {"continue_training": False}
    dataset_json = json.loads((args.folder / "dataset.json").read_text(encoding="utf-8"))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = nnUNetTrainer(plans, args.configuration, "all", dataset_json, args.device)
        trainer.initialize()
        trainer.on_train_epoch_start()
    return lambda number: trainer.train_step(subject.batches[number % len(subject.batches)])


def main() -> None:
    args = parse(argument_parser(__doc__, rounds=7))
    with tempfile.TemporaryDirectory() as results, environment({"nnUNet_results": results, "nnUNet_n_proc_DA": "0"}):
        native, single = prepare(TRAINER, args), prepare(TRAINER, args)
        precision, single.trainer.precision = str(native.trainer.precision).removeprefix("torch."), torch.float32
        works = {precision: native.step, "float32": single.step, "nnUNetTrainer": stock_step(native, args)}
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(args.rounds):
            print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
            for name, work in list(works.items())[:: 1 if turn % 2 == 0 else -1]:
                times = [timed(lambda n=n, work=work: work(n), args.device)[1] for n in range(args.steps + 1)]
                seconds[name].append(sorted(times[1:])[len(times[1:]) // 2])
    print("| step | seconds | times faster in the chosen precision (range) |\n| --- | --- | --- |")
    for name, own in seconds.items():
        ratios = sorted(value / first for value, first in zip(own, seconds[precision], strict=True))
        median, middle = sorted(own)[len(own) // 2], ratios[len(ratios) // 2]
        print(f"| {name} | {median:.3f} | {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main()
