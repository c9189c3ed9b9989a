"""What a training step of each method costs, relative to SupervisedTrainer's step on the same plans.

    export nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/step_cost.py 510 --plans LGSSLCPUPlans_labeled4 --steps 5 --rounds 3
    python benchmarks/step_cost.py 510 --plans ... --trainers MeanTeacherTrainer ACMTTrainer:variant=uncertainty

SupervisedTrainer's step is stock nnU-Net's: one network, n labelled patches (n is the planned batch size). All other
methods get n unlabelled patches as well. What is measured, for every trainer of the package or the named ones:

- **Seconds of a step**: `train_step` on batches that were drawn beforehand, in the middle of training, when ramps and
  terms are active. Trainers take turns: in each round every trainer does one step that does not count and then --steps
  that do, forwards in one round and backwards in the next, so that drift of the machine hits all alike. The seconds are
  the median of all; the ratio is the median over rounds of the ratio to SupervisedTrainer's median in the same round.
- **Step / passes and losses**: in steps of their own in the same rounds, the time of the step by the time spent in
  `loss_terms`, in backward passes and in `extra_steps` (critics' own updates), as median and range. The rest is the
  engine: optimiser, clipping, teacher, seeds and logs.
- **Seconds of the loader**: median per batch, drawn one after the other in this process, without workers.
- **Memory of a step**, in a fresh process for each trainer. On CUDA `torch.cuda.max_memory_allocated` over three steps,
  weights included. On Linux the highest resident set during three steps minus the resident set just before the first,
  when networks, loader and batches are in memory and freed memory was given back: activations, gradients, state of the
  optimiser and working memory of the convolutions, but not the weights. Elsewhere it is left out.
- **Floor**: what the passes through networks must cost, by the rules of methods.md section 18: a forward pass of the
  plans' network on one patch is 1, a backward pass 2; losses, attention, critics, heads and loaders are not counted.
  `COUNTS` holds the passes per method; how much of the network an encoder or a decoder is, is counted on these plans by
  torch's flop counter. Section 18 relates to a step on 2n patches, the ratios here to one on n, hence twice as large.
- **Counted**: what torch's flop counter counts in one real step, relative to SupervisedTrainer's. It includes every
  convolution and matrix product, so where it is far above the floor, `COUNTS` or the implementation is wrong.
- **Floor in seconds**: the same passes, each at the time that it takes here: networks, encoder and decoders are timed
  with and without gradient on n patches in the same rounds. On a CPU a backward pass costs more than two forward ones.

Every trainer gets the first UNLABELED_CASES unlabelled cases, because PseudoLabelTrainer has to label them all first,
here by a SupervisedTrainer that has hardly been trained: its pseudo-labels are worth nothing, but cost what others do.

The table is printed in markdown; --output also gets every single time. Nothing is written to nnUNet_results.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lgssl_nnunet.engine.precision import move_network
from lgssl_nnunet.errors import LGSSLError
from lgssl_nnunet.files import environment, write_json
from lgssl_nnunet.inference.device import choose_device, describe_device
from lgssl_nnunet.networks.attention_gates import AttentionGatedUNet
from lgssl_nnunet.networks.decoders import interpolating_decoder
from lgssl_nnunet.networks.families import as_plain, as_residual
from lgssl_nnunet.networks.unet import planned_unet
from lgssl_nnunet.registry import find_trainer, trainer_names

REFERENCE = "SupervisedTrainer"
STEPS_FOR_MEMORY = 3
UNLABELED_CASES = 4
BACKWARD = 2  # forward passes that a backward pass is worth


@dataclass(frozen=True)
class Passes:
    """Passes of one step through parts of networks, in units of n patches.

    Attributes:
        trained: part (of `build_parts`) to passes with gradient.
        untrained: part to passes without gradient.
        section_18: factor in methods.md section 18 of the form that is implemented, for stock nnU-Net's network and
            relative to a step on 2n patches; None where it depends on more than that network.
    """

    trained: Mapping[str, float]
    untrained: Mapping[str, float] = field(default_factory=dict)
    section_18: float | None = None


def _interpolating(hp: Any) -> str:
    return "faithful decoder" if hp.faithful_decoder else "interpolating decoder"


def _decoders(hp: Any, further: int, factors: tuple[float, float]) -> Passes:
    """One encoder, its decoder and `further` interpolating ones, on labelled and unlabelled patches."""
    trained = {"encoder": 2, "decoder": 2, _interpolating(hp): 2 * further}
    return Passes(trained, section_18=factors[hp.faithful_decoder])


def _ac_mt(hp: Any) -> Passes:
    # On top of the teacher's pass that is the target.
    further = {"entropy": 0, "uncertainty": hp.passes, "label_error": 1, "prototype": hp.passes}[hp.variant]
    section_18 = {"entropy": 1.17, "uncertainty": 2.50, "label_error": 1.33}.get(hp.variant)
    return Passes({"network": 2}, {"network": 1 + further}, section_18)


# By method, as a function of its hyper-parameters. "network" is the plans' network with all its decoder.
COUNTS: dict[str, Callable[[Any], Passes]] = {
    REFERENCE: lambda hp: Passes({"network": 1}, section_18=0.5),
    "LGSSLTrainer": lambda hp: _decoders(hp, 1, (1.71, 2.14)),
    "MCNetPlusTrainer": lambda hp: _decoders(hp, hp.num_decoders - 1, (2.42, 3.28)),
    "MeanTeacherTrainer": lambda hp: Passes({"network": 2}, {"network": 1}, 1.17),
    # T passes for the uncertainty and one for the target.
    "UAMTTrainer": lambda hp: Passes({"network": 2}, {"network": hp.passes + 1}, 2.50),
    "ACMTTrainer": _ac_mt,
    "CPSTrainer": lambda hp: Passes({"network": 4}, section_18=2.00),
    "FixMatchTrainer": lambda hp: Passes({"network": 2}, {"network": 1}, 1.17),
    # Stage 2: the teacher labels n patches, the student sees n mixtures.
    "BCPTrainer": lambda hp: Passes({"network": 1}, {"network": 1}, 0.67),
    # On unlabelled patches only the worse network has a gradient; the floor is a step in which that is the plain one.
    "MCFTrainer": lambda hp: Passes({"plain network": 2, "residual network": 1}, {"residual network": 1}),
    "TACTrainer": lambda hp: Passes({"gated network": 2}, section_18=1.02),
    # Two networks with half of the patches each; per network T passes and one for the label, all of the other network.
    "DeSCOTrainer": lambda hp: Passes({"network": 2}, {"network": hp.passes + 1}, 2.50),
    # Labelled and unlabelled patches in one pass of each network; the critics come on top.
    "CoBioNetTrainer": lambda hp: Passes({"network": 4}, section_18=2.00),
    "PseudoLabelTrainer": lambda hp: Passes({"network": 2}, section_18=1.00),
    # The second network has an interpolating decoder; its attention comes on top.
    "CAMLTrainer": lambda hp: Passes(
        {"encoder": 4, "decoder": 2, _interpolating(hp): 2}, section_18=(2.00, 2.43)[hp.faithful_decoder]
    ),
}


def floor_in_passes(passes: Passes, cost: Mapping[str, float]) -> float:
    """Return the floor of a step relative to SupervisedTrainer's; `cost` is that of a forward pass of each part."""
    trained = sum((1 + BACKWARD) * number * cost[part] for part, number in passes.trained.items())
    untrained = sum(number * cost[part] for part, number in passes.untrained.items())
    return (trained + untrained) / ((1 + BACKWARD) * cost["network"])


def floor_in_seconds(passes: Passes, seconds: Mapping[tuple[str, bool], float]) -> float:
    """Return the floor of a step; `seconds` by part and whether with gradient, on n patches."""
    trained = sum(number * seconds[part, True] for part, number in passes.trained.items())
    return trained + sum(number * seconds[part, False] for part, number in passes.untrained.items())


# --------------------------------------------------------------------------------------------------------- subjects


class Stopwatch:
    """Adds up the time spent in some functions; one that is called by another of them counts once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self._running = False

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._running:
                return function(*args, **kwargs)
            self._running = True
            try:
                result, seconds = timed(lambda: function(*args, **kwargs), self.device)
            finally:
                self._running = False
            self.seconds += seconds
            return result

        return call


@dataclass
class Subject:
    """A trainer in the middle of training, with batches, and what was measured of it."""

    cell: str
    trainer: Any
    batches: list[dict]
    loader_seconds: float
    step_seconds: list[list[float]] = field(default_factory=list)
    watched_seconds: list[list[float]] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)
    memory: int | None = None
    flops: int = 0

    @property
    def passes(self) -> Passes | None:
        """The passes of its method, None where `COUNTS` does not know it."""
        counts = COUNTS.get(type(self.trainer).__name__)
        return None if counts is None else counts(self.trainer.hp)

    def step(self, number: int) -> None:
        """Do a step as in the middle of training."""
        self.trainer.iteration = self.trainer.num_iterations // 2 + number
        self.trainer.train_step(self.batches[number % len(self.batches)])

    def watched_step(self, number: int) -> None:
        """Do a step and note how much longer it takes than its passes and losses."""
        watch = Stopwatch(self.trainer.device)
        with (
            mock.patch.object(self.trainer, "loss_terms", watch.watched(self.trainer.loss_terms)),
            mock.patch.object(self.trainer, "extra_steps", watch.watched(self.trainer.extra_steps)),
            mock.patch.object(torch.Tensor, "backward", watch.watched(torch.Tensor.backward)),
        ):
            seconds = timed(lambda: self.step(number), self.trainer.device)[1]
        self.overheads.append(seconds / watch.seconds)


def prepare(cell: str, args: argparse.Namespace) -> Subject:
    """Build the trainer of TRAINER[:name=value,...] and draw its batches; the first of them does not count."""
    name, _, settings = cell.partition(":")
    plans = json.loads((args.folder / f"{args.plans}.json").read_text(encoding="utf-8"))
    training = plans["lgssl"].setdefault("training", {})
    training["hyperparameters"] = dict(setting.split("=", 1) for setting in settings.split(",") if setting)
    dataset_json = json.loads((args.folder / "dataset.json").read_text(encoding="utf-8"))
    plans["continue_training"] = False
    plans["lgssl"]["split"]["unlabeled"] = plans["lgssl"]["split"]["unlabeled"][:UNLABELED_CASES]
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = find_trainer(name)(plans, args.configuration, "all", dataset_json, args.device)
        trainer.show_progress = False
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    batches, seconds = [], []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        batches.append(next(trainer.dataloader_train))
        seconds.append(time.perf_counter() - start)
    return Subject(cell, trainer, batches, statistics.median(seconds[1:]))


def in_fresh_process(cell: str, args: argparse.Namespace) -> tuple[int | None, int]:
    """Return the memory in bytes and the flops of a step; to be called in a process that has done nothing else."""
    subject = prepare(cell, args)
    before = start_of_memory(args.device)
    for number in range(STEPS_FOR_MEMORY):
        subject.step(number)
    memory = None if before is None else peak_of_memory(args.device) - before
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        subject.step(STEPS_FOR_MEMORY)
    return memory, counter.get_total_flops()


def start_of_memory(device: torch.device) -> int | None:
    """Forget the peak so far and return what does not belong to the step; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    if platform.system() != "Linux":
        return None
    if platform.libc_ver()[0] == "glibc":
        # Loading leaves freed memory behind, which a step would use before it asks for more.
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak_of_memory(device: torch.device) -> int:
    """Return the highest memory since `start_of_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# ------------------------------------------------------------------------------------------------ parts of networks


@dataclass
class Part:
    """A network, encoder or decoder with inputs of n patches, and what was measured of it."""

    module: torch.nn.Module
    inputs: list[torch.Tensor]
    autocast: Callable[[], Any]
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def run(self, gradient: bool) -> None:
        """Do a forward pass, and with gradient a backward pass."""
        for tensor in [*self.module.parameters(), *self.inputs]:
            tensor.grad = None
        with torch.set_grad_enabled(gradient), self.autocast():
            outputs = self.module(self.inputs[0] if len(self.inputs) == 1 else self.inputs)
        if gradient:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    def cost(self) -> int:
        """Count the flops of a forward pass."""
        with FlopCounterMode(display=False) as counter:
            self.run(gradient=False)
        return counter.get_total_flops()


def build_parts(subject: Subject, wanted: set[str]) -> dict[str, Part]:
    """Return the wanted parts, made from the plans, with the labelled images of the subject's first batch as input."""
    trainer = subject.trainer
    configuration, outputs = trainer.configuration_manager, trainer.label_manager.num_segmentation_heads
    image = trainer.to_batches(subject.batches[0])[0].image

    def move(module: nn.Module) -> nn.Module:
        return move_network(module, trainer.device, image.ndim - 2)

    def build(family: ConfigurationManager = configuration) -> nn.Module:
        return move(planned_unet(family, trainer.num_input_channels, outputs))

    network = build()
    with torch.no_grad(), trainer.autocast():
        skips = network.encoder(image)
    skips = [skip.detach().requires_grad_() for skip in skips]

    def decoder(faithful: bool) -> nn.Module:
        convolutions = [len(stage.convs) for stage in network.decoder.stages]
        return move(interpolating_decoder(network.encoder, outputs, convolutions, True, faithful))

    builders = {
        "network": lambda: (network, [image]),
        "encoder": lambda: (network.encoder, [image]),
        "decoder": lambda: (network.decoder, skips),
        "interpolating decoder": lambda: (decoder(faithful=False), skips),
        "faithful decoder": lambda: (decoder(faithful=True), skips),
        "gated network": lambda: (move(AttentionGatedUNet(build())), [image]),
        "plain network": lambda: (build(as_plain(configuration)), [image]),
        "residual network": lambda: (build(as_residual(configuration)), [image]),
    }
    return {name: Part(*builders[name](), trainer.autocast) for name in sorted({"network", *wanted})}


# ---------------------------------------------------------------------------------------------------------- measuring


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def measure(subjects: list[Subject], parts: Mapping[str, Part], args: argparse.Namespace) -> None:
    """Time every step and every part in rounds; the first call in each round does not count."""
    works = [(subject.step_seconds, subject.step) for subject in subjects]
    works += [(subject.watched_seconds, subject.watched_step) for subject in subjects]
    works += [
        (part.seconds[gradient], lambda number, part=part, gradient=gradient: part.run(gradient))
        for part in parts.values()
        for gradient in (True, False)
    ]
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr)
        for seconds, work in works if turn % 2 == 0 else reversed(works):
            times = [timed(lambda n=n, work=work: work(n), args.device)[1] for n in range(args.steps + 1)]
            seconds.append(times[1:])


def median_of_rounds(rounds: list[list[float]]) -> float:
    return statistics.median(seconds for times in rounds for seconds in times)


def ratio(rounds: list[list[float]], reference: list[list[float]]) -> float:
    pairs = zip(rounds, reference, strict=True)
    return statistics.median(statistics.median(own) / statistics.median(other) for own, other in pairs)


def result(subject: Subject, reference: Subject, parts: Mapping[str, Part], costs: Mapping[str, int]) -> dict[str, Any]:
    """Return everything about a trainer; floors are None where `COUNTS` does not know it."""
    passes = subject.passes
    seconds = {(name, g): median_of_rounds(part.seconds[g]) for name, part in parts.items() for g in (True, False)}
    return {
        "trainer": subject.cell,
        "step seconds": median_of_rounds(subject.step_seconds),
        "step ratio": ratio(subject.step_seconds, reference.step_seconds),
        "floor ratio": None if passes is None else floor_in_passes(passes, costs),
        "counted ratio": subject.flops / reference.flops,
        "section 18 ratio": None if passes is None or passes.section_18 is None else 2 * passes.section_18,
        "floor seconds": None if passes is None else floor_in_seconds(passes, seconds),
        "step by passes and losses": subject.overheads,
        "loader seconds": subject.loader_seconds,
        "memory bytes": subject.memory,
        "every step's seconds": subject.step_seconds,
        "passes": None if passes is None else dataclasses.asdict(passes),
    }


# ---------------------------------------------------------------------------------------------------------- reporting

COLUMNS = {
    "trainer": lambda row, reference: row["trainer"],
    "step [s]": lambda row, reference: number(row["step seconds"], 3),
    "ratio": lambda row, reference: number(row["step ratio"]),
    "floor": lambda row, reference: number(row["floor ratio"]),
    "ratio / floor": lambda row, reference: quotient(row["step ratio"], row["floor ratio"]),
    "counted": lambda row, reference: number(row["counted ratio"]),
    "section 18": lambda row, reference: number(row["section 18 ratio"]),
    "floor [s]": lambda row, reference: number(row["floor seconds"], 3),
    "step / floor [s]": lambda row, reference: quotient(row["step seconds"], row["floor seconds"]),
    "step / passes and losses": lambda row, reference: spread(row["step by passes and losses"]),
    "loader [s]": lambda row, reference: number(row["loader seconds"], 3),
    "memory [MB]": lambda row, reference: quotient(row["memory bytes"], 2**20, 0),
    "memory ratio": lambda row, reference: quotient(row["memory bytes"], reference["memory bytes"]),
}


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def spread(values: list[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def quotient(value: float | None, by: float | None, digits: int = 2) -> str:
    return number(None if value is None or by is None else value / by, digits)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [[column(row, rows[0]) for column in COLUMNS.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def prepare_all(args: argparse.Namespace) -> list[Subject]:
    """Prepare SupervisedTrainer and the asked trainers, and say which of them refuse these plans."""
    subjects = []
    for cell in dict.fromkeys([REFERENCE, *(args.trainers or trainer_names())]):
        print(f"preparing {cell}", file=sys.stderr)
        try:
            subject = prepare(cell, args)
        except LGSSLError as error:
            print(f"{cell} is left out: {error}\n")
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            subject.memory, subject.flops = processes.submit(in_fresh_process, cell, args).result()
        if cell == REFERENCE:
            subject.trainer.save_checkpoint(str(Path(subject.trainer.output_folder) / "checkpoint_final.pth"))
        subjects.append(subject)
    return subjects


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and return rows, parts and circumstances."""
    subjects = prepare_all(args)
    known = [subject.passes for subject in subjects if subject.passes is not None]
    parts = build_parts(subjects[0], {name for passes in known for name in [*passes.trained, *passes.untrained]})
    costs = {name: part.cost() for name, part in parts.items()}
    measure(subjects, parts, args)
    return {
        "rows": [result(subject, subjects[0], parts, costs) for subject in subjects],
        "parts": {
            name: {
                "cost relative to the network": costs[name] / costs["network"],
                "seconds with gradient": median_of_rounds(part.seconds[True]),
                "seconds without gradient": median_of_rounds(part.seconds[False]),
            }
            for name, part in parts.items()
        },
        "plans": args.plans,
        "configuration": args.configuration,
        "patches": subjects[0].trainer.batch_size,
        "precision": str(subjects[0].trainer.precision).removeprefix("torch."),
        "versions": {package: version(package) for package in ("torch", "nnunetv2", "lgssl_nnunet")},
        "machine": f"{describe_device(args.device)}, {platform.machine()}, {os.cpu_count()} cores",
    }


def argument_parser(description: str, rounds: int) -> argparse.ArgumentParser:
    """Return the parser of a benchmark of steps: which plans, and how often is measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="dataset id in nnUNet_preprocessed")
    parser.add_argument("--plans", required=True)
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per form and round, on as many batches")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("-device", default=None)
    return parser


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, of the command line or `words`, with the dataset's `folder`, and the device itself."""
    args = parser.parse_args(words)
    args.folder = next(Path(os.environ["nnUNet_preprocessed"]).glob(f"Dataset{int(args.dataset):03d}_*"))
    args.device = choose_device(args.device)
    return args


def main() -> None:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--trainers", nargs="+", metavar="TRAINER[:name=value,...]", help="default: every trainer")
    parser.add_argument("--output", type=Path, help="JSON file for everything that was measured")
    args = parse(parser)
    with (
        tempfile.TemporaryDirectory() as results,
        environment({"nnUNet_results": results, "nnUNet_n_proc_DA": "0"}),
    ):
        report = measured(args)
    if args.output:
        write_json(report, args.output)
    print(table(report["rows"]))
    print("\n| part | cost | with gradient [s] | without [s] |\n| --- | --- | --- | --- |")
    for name, part in report["parts"].items():
        print(f"| {name} | {' | '.join(number(value, 3) for value in part.values())} |")
    print(f"\n{report['plans']}, {report['precision']}, {report['machine']}")


if __name__ == "__main__":
    main()
