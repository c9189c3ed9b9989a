"""Where the time of a training batch goes, and what interpolating labels only at their boundaries saves.

    export nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/augmentation.py parts 510 --plans LGSSLCPUPlans_labeled4 --trainers SupervisedTrainer LGSSLTrainer
    python benchmarks/augmentation.py labels 510 --plans LGSSLCPUPlans_labeled4
    python benchmarks/augmentation.py generated --shape 160 192 192 --patch 96 128 128 --classes 14

`parts`: batches drawn one after the other in this process, one thread, under Python's profiler: milliseconds per batch
(two patches; four with an unlabelled stream) and their share of the batch.

`labels` and `generated`: nnU-Net's spatial transform of the label map and ours, in turns on the same patches and
deformations; patches that are only cropped do not count. The ratio is the median over patches, with the 10th and 90th
percentile. The results are compared as well: any difference ends the benchmark.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from unittest import mock

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from generated_ct import ct
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from step_cost import argument_parser, parse, prepare
from torch import Tensor

from lgssl_nnunet.data.spatial import BoundaryInterpolation
from lgssl_nnunet.files import environment

# Row of the table to a function that it is the time of: part of its file's name, and its own.
PARTS = {
    "whole batch": ("data_loader.py", "generate_train_batch"),
    "opening cases": ("nnunet_dataset.py", "load_case"),
    "cutting out and padding": ("bounding_boxes.py", "crop_and_pad_nd"),
    "limiting threads": ("threadpoolctl.py", "_load_libraries"),
    "spatial: grid": ("spatial.py", "get_parameters"),
    "spatial: image": ("spatial.py", "_apply_to_image"),
    "spatial: labels": ("data/spatial.py", "_apply_to_segmentation"),
    "intensities": ("random.py", "apply"),
    "scales of deep supervision": ("deep_supervision_downsampling.py", "_apply_to_segmentation"),
}
stock = SpatialTransform._apply_to_segmentation
ours = BoundaryInterpolation._apply_to_segmentation


class Comparison:
    """Transforms label maps by nnU-Net's code and by ours, and keeps the seconds of both."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []

    def __call__(self, transform: BoundaryInterpolation, segmentation: Tensor, **parameters: Tensor | None) -> Tensor:
        """Return the transformed label map."""
        if parameters["grid"] is None:
            return stock(transform, segmentation, **parameters)
        results, seconds = {}, {}
        for function in (stock, ours)[:: 1 if len(self.seconds) % 2 == 0 else -1]:
            start = time.perf_counter()
            results[function] = function(transform, segmentation, **parameters)
            seconds[function] = time.perf_counter() - start
        if not torch.equal(results[stock], results[ours]):
            sys.exit("the label maps differ")
        self.seconds.append((seconds[stock], seconds[ours]))
        return results[ours]

    def report(self, name: str) -> None:
        """Print the table."""
        nnunet, own = (1000 * statistics.median(column) for column in zip(*self.seconds, strict=True))
        low, middle, high = np.percentile([theirs / own for theirs, own in self.seconds], (10, 50, 90))
        print("| label maps | deformed patches | nnU-Net [ms] | ours [ms] | times faster |")
        print("| --- | --- | --- | --- | --- |")
        print(f"| {name} | {len(self.seconds)} | {nnunet:.1f} | {own:.1f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")


def parts(args: argparse.Namespace) -> None:
    """Print where the time of a batch goes."""
    columns = {}
    for name in args.trainers:
        loader = prepare(name, args).trainer.dataloader_train
        with cProfile.Profile() as profile:
            for _ in range(args.batches):
                next(loader)
        timings = pstats.Stats(profile).stats
        columns[name] = {part: 1000 * _cumulative(timings, *where) / args.batches for part, where in PARTS.items()}
    print(f"| part | {' | '.join(f'{name} [ms] | share' for name in columns)} |\n|{' --- |' * (1 + 2 * len(columns))}")
    for part in PARTS:
        cells = [f"{times[part]:.1f} | {times[part] / times['whole batch']:.2f}" for times in columns.values()]
        print(f"| {part} | {' | '.join(cells)} |")


def _cumulative(timings: dict, file: str, function: str) -> float:
    return sum(values[3] for (path, _, name), values in timings.items() if name == function and path.endswith(file))


def labels(args: argparse.Namespace) -> None:
    """Compare both on the patches of a training."""
    loader = prepare("SupervisedTrainer", args).trainer.dataloader_train
    comparison = Comparison()

    def method(transform: BoundaryInterpolation, segmentation: Tensor, **parameters: Tensor | None) -> Tensor:
        return comparison(transform, segmentation, **parameters)

    with mock.patch.object(BoundaryInterpolation, "_apply_to_segmentation", method):
        for _ in range(args.batches):
            next(loader)
    comparison.report(args.folder.name)


def generated(args: argparse.Namespace) -> None:
    """Compare both on a made-up CT."""
    angles = (-np.pi / 6, np.pi / 6)
    pipeline = nnUNetTrainer.get_training_transforms(args.patch, angles, None, (), False)
    transform = BoundaryInterpolation.of(pipeline.transforms[0])
    segmentation = torch.from_numpy(ct(args.shape, args.classes, 0)[1].astype(np.int16))[None]
    comparison = Comparison()
    while len(comparison.seconds) < args.batches:
        comparison(transform, segmentation, **transform.get_parameters(image=segmentation))
    comparison.report(f"generated, {args.classes} classes, {' x '.join(map(str, args.shape))}")


def main() -> None:
    torch.set_num_threads(1)
    what, *words = sys.argv[1:] or [""]
    if what == "generated":
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--shape", nargs=3, type=int, default=[160, 192, 192])
        parser.add_argument("--patch", nargs=3, type=int, default=[96, 128, 128])
        parser.add_argument("--classes", type=int, default=14)
        parser.add_argument("--batches", type=int, default=20)
        generated(parser.parse_args(words))
        return
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--trainers", nargs="+", default=["SupervisedTrainer", "LGSSLTrainer"])
    parser.add_argument("--batches", type=int, default=40)
    works = {"parts": parts, "labels": labels}
    if what not in works:
        parser.error("say parts, labels or generated first")
    args = parse(parser, words)
    with tempfile.TemporaryDirectory() as results, environment({"nnUNet_results": results, "nnUNet_n_proc_DA": "0"}):
        works[what](args)


if __name__ == "__main__":
    main()
