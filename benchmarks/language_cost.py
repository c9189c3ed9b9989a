"""What language costs: LGSSLTrainer's training step and prediction against the same without text and fusion.

    export nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/language_cost.py 510 --plans LGSSLCPUPlans_labeled4 --steps 5 --rounds 7

The forms take turns on the same batches, forwards in one round and backwards in the next; the ratio is the median over
rounds of the ratio of medians within a round. A step is all of `train_step`, without the loader. A prediction is the
network's forward pass as `lgssl_predict` makes it (two views, eval, first decoder, full resolution only), 4 per
measurement. Peers in the call are compared with the first form, `prompt_mode=none`. Nothing is written to
nnUNet_results.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from step_cost import Subject, argument_parser, parse, prepare, ratio, timed

from lgssl_nnunet.files import environment
from lgssl_nnunet.inference.predictor import VIEWS_AT_ONCE

WITHOUT = "LGSSLTrainer:prompt_mode=none"
FORMS = [
    "LGSSLTrainer",
    "LGSSLTrainer:prompt_mode=fixed_volume",
    "LGSSLTrainer:class_map_weight=1,alignment_weight=1",
    "LGSSLTrainer:tvsf_stages=2",
]
PREDICTIONS = 4


def predict(subject: Subject, number: int) -> None:
    """Run the network on as many patches as for prediction, and leave it as for training."""
    trainer = subject.trainer
    image = trainer.to_batches(subject.batches[number % len(subject.batches)])[0].image[:VIEWS_AT_ONCE]
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    with torch.inference_mode(), trainer.autocast():
        for _ in range(PREDICTIONS):
            trainer.network(image)
    trainer.network.train()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)


def measure(subjects: list[Subject], args: argparse.Namespace) -> dict[str, list[list[list[float]]]]:
    """Return seconds by kind of work, subject and round; the first call in each round does not count."""
    works = {"training step": lambda subject, n: subject.step(n), "prediction": predict}
    seconds = {kind: [[] for _ in subjects] for kind in works}
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
        order = list(enumerate(subjects))[:: 1 if turn % 2 == 0 else -1]
        for kind, work in works.items():
            for position, subject in order:
                times = [
                    timed(lambda n=n, s=subject, work=work: work(s, n), args.device)[1] for n in range(args.steps + 1)
                ]
                seconds[kind][position].append(times[1:])
    return seconds


def main() -> None:
    parser = argument_parser(__doc__, rounds=7)
    parser.add_argument("--trainers", nargs="+", default=FORMS, metavar="TRAINER[:name=value,...]")
    args = parse(parser)
    with tempfile.TemporaryDirectory() as results, environment({"nnUNet_results": results, "nnUNet_n_proc_DA": "0"}):
        subjects = [prepare(cell, args) for cell in [WITHOUT, *args.trainers]]
        seconds = measure(subjects, args)
    print("| form | training step | prediction |\n| --- | --- | --- |")
    for position, subject in enumerate(subjects):
        ratios = [ratio(rounds[position], rounds[0]) for rounds in seconds.values()]
        print(f"| `{subject.cell}` | {' | '.join(f'{value:.3f}' for value in ratios)} |")


if __name__ == "__main__":
    main()
