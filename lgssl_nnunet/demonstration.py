"""The whole pipeline on a made-up dataset, in a few minutes and without a GPU: what `lgssl_demo` does.

Draws the phantom (6 labelled, 24 unlabelled and 8 test cases), plans it, trains LGSSLTrainer and the baseline
SupervisedTrainer with the same number of iterations, segments the test cases and evaluates them, through the functions
behind the commands. One seed on a small phantom: it shows that everything works and where results lie, not how good a
method is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.files import environment
from lgssl_nnunet.paths import VARIABLES
from lgssl_nnunet.phantom import GALLBLADDER, PhantomSpec, write_phantom_dataset

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

SPEC = PhantomSpec(shape=(24, 32, 32))
BASELINE, METHOD = "SupervisedTrainer", "LGSSLTrainer"
ITERATIONS = 320
EPOCHS = 10
MARKER = "lgssl_demo.json"
FONT_SIZE = 9  # said everywhere: nnU-Net's plotting changes matplotlib's default for the whole process
COLORS = {"liver": "#ff9f1c", "gallbladder": "#2ec4b6"}


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies.

    Attributes:
        folder: everything that was written: nnU-Net's three folders, predictions, log, dice.json, overlays.png.
        dice: mean Dice over the test cases by trainer and class name.
        overlays: picture of every test case with the reference and both trainers' segmentations.
        seconds: duration of each step by name.
    """

    folder: Path
    dice: dict[str, dict[str, float]]
    overlays: Path
    seconds: dict[str, float]

    def table(self) -> str:
        """Return Dice per trainer and class as plain text."""
        classes = list(next(iter(self.dice.values())))
        rows = [f"{'mean Dice, test cases':<24}" + "".join(f"{name:>14}" for name in [*classes, "mean"])]
        for trainer, values in self.dice.items():
            numbers = [*values.values(), float(np.mean(list(values.values())))]
            rows.append(f"{trainer:<24}" + "".join(f"{number:>14.3f}" for number in numbers))
        return "\n".join(rows)


def demo(
    output: Path | str | None = None,
    *,
    iterations: int = ITERATIONS,
    seed: int = 0,
    num_processes: int = 1,
    spec: PhantomSpec = SPEC,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> DemoResult:
    """Run plan, train, predict and evaluate on a phantom dataset.

    Args:
        output: folder for everything; default `lgssl_demo` in the current folder. A folder of an earlier demo is
            cleared first.
        iterations: optimiser steps of each trainer.
        seed: training seed, the same for both trainers.
        num_processes: worker processes that augment patches, 0 for none; all else runs in this process.
        spec: the phantom.
        device: torch device or its name; None chooses.
        progress: show progress bars; the one of training on a terminal only.

    Returns:
        Dice by trainer and class, and where everything lies.

    Raises:
        UsageError: the folder holds something else.
    """
    if iterations < 1:
        raise UsageError(f"--iterations must be at least 1, not {iterations}.")
    folder = Path(output or "lgssl_demo").expanduser().resolve()
    variables = {name: str(folder / name) for name in VARIABLES} | {"nnUNet_n_proc_DA": str(num_processes)}
    _claim_folder(folder, spec.dataset_id)
    steps = _Steps(folder / "log.txt")
    with environment(variables):
        with steps("draw"):
            dataset = write_phantom_dataset(folder / "nnUNet_raw", spec, progress=progress)
        models = _plan_and_train(spec, iterations, seed, device, progress, steps)
        predictions = _predict_test_cases(dataset, folder, models, device, progress, steps)
        with steps("evaluate"):
            dice = {trainer: _evaluate(dataset, predictions[trainer], models[trainer], progress) for trainer in models}
            overlays = draw_overlays(dataset, predictions, folder / "overlays.png")
    (folder / "dice.json").write_text(json.dumps(dice, indent=2) + "\n", encoding="utf-8")
    return DemoResult(folder, dice, overlays, steps.seconds)


class _Steps:
    """Announces and times the steps, and sends what nnU-Net prints meanwhile to a file."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        logger.info("--- %s", name)
        start = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            yield
        self.seconds[name] = round(time.monotonic() - start, 1)
        logger.info("--- %s took %.0f s", name, self.seconds[name])


def _claim_folder(folder: Path, dataset_id: int) -> None:
    """Make the folder, or clear it of the phantom if an earlier demo made it; other datasets in it stay.

    Raises:
        UsageError: it is a file or holds something that is not a demo's.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name another folder with -o.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UsageError(f"{folder} is not empty and was not made by lgssl_demo: name another folder with -o.")
    for variable in VARIABLES:
        for made in folder.glob(f"{variable}/Dataset{dataset_id:03d}_*"):
            shutil.rmtree(made)
    shutil.rmtree(folder / "predictions", ignore_errors=True)
    for name in ("log.txt", "dice.json", "overlays.png"):
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text('{"made_by": "lgssl_demo"}\n', encoding="utf-8")


def _plan_and_train(
    spec: PhantomSpec, iterations: int, seed: int, device: str | torch.device | None, progress: bool, steps: _Steps
) -> dict[str, Path]:
    """Return the model folder of each trainer."""
    from lgssl_nnunet.plans.plan import plan_and_preprocess
    from lgssl_nnunet.training import train

    configuration = "2d" if len(spec.shape) == 2 else "3d_fullres"
    with steps("plan"):
        plan_and_preprocess(
            [spec.dataset_id],
            planner="LGSSLPlannerCPU",
            configurations=[configuration],
            num_processes=0,
            num_processes_fingerprint=0,
            progress=progress,
        )
    epochs = min(EPOCHS, iterations)
    models = {}
    for trainer in (BASELINE, METHOD):
        with steps(f"train {trainer}"):
            models[trainer] = train(
                spec.dataset_id,
                configuration,
                trainer,
                epochs=epochs,
                iterations_per_epoch=max(1, round(iterations / epochs)),
                seed=seed,
                device=device,
                progress=None if progress else False,  # None: on a terminal only
            )
    return models


def _predict_test_cases(
    dataset: Path,
    folder: Path,
    models: dict[str, Path],
    device: str | torch.device | None,
    progress: bool,
    steps: _Steps,
) -> dict[str, Path]:
    """Return the folder of segmentations of each trainer."""
    from lgssl_nnunet.inference.predict import predict

    predictions = {}
    for trainer, model in models.items():
        predictions[trainer] = folder / "predictions" / trainer
        with steps(f"predict {trainer}"):
            predict(
                dataset / "imagesTs",
                predictions[trainer],
                model_folder=model,
                num_processes_preprocessing=0,
                num_processes_segmentation_export=0,
                device=device,
                progress=progress,
            )
    return predictions


def _evaluate(dataset: Path, prediction: Path, model: Path, progress: bool) -> dict[str, float]:
    """Return mean Dice by class name."""
    from lgssl_nnunet.evaluation.evaluate import evaluate

    result = evaluate(
        dataset / "labelsTs",
        prediction,
        dataset_json=dataset / "dataset.json",
        plans=model / "plans.json",
        num_processes=0,
        progress=progress,
    )
    return {mean.name: float(mean.dice) for mean in result["classes"]}


def draw_overlays(dataset: Path, predictions: dict[str, Path], file: Path) -> Path:
    """Draw one slice of each test case: a row per trainer, the reference in white, classes in colour.

    Args:
        dataset: raw dataset folder with imagesTs and labelsTs.
        predictions: folder of segmentations by trainer name.
        file: the PNG to write.

    Returns:
        `file`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    references = sorted((dataset / "labelsTs").glob("*.nii.gz"))
    figure = Figure(figsize=(2 * len(references), 2.2 * len(predictions) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(predictions), len(references), squeeze=False)
    for row, (trainer, folder) in zip(axes, predictions.items(), strict=True):
        row[0].set_ylabel(trainer, fontsize=FONT_SIZE)
        for axis, reference in zip(row, references, strict=True):
            image = dataset / "imagesTs" / reference.name.replace(".nii.gz", "_0000.nii.gz")
            _draw_case(axis, _read_array(image), _read_array(reference), _read_array(folder / reference.name))
    lines = [Line2D([], [], color="white", label="reference")]
    lines += [Line2D([], [], color=color, label=name) for name, color in COLORS.items()]
    figure.legend(
        handles=lines,
        loc="outside lower center",
        ncols=len(lines),
        facecolor="0.3",
        labelcolor="white",
        fontsize=FONT_SIZE,
    )
    figure.savefig(file, dpi=110)
    return file


def _draw_case(axis: Axes, image: np.ndarray, reference: np.ndarray, segmentation: np.ndarray) -> None:
    """Draw the slice that shows most of the gallbladder."""
    if image.ndim == 3:
        slice_index = int((reference == GALLBLADDER).sum((1, 2)).argmax())
        image, reference, segmentation = image[slice_index], reference[slice_index], segmentation[slice_index]
    axis.imshow(image, cmap="gray", vmax=np.percentile(image, 99.5))
    for value, color in enumerate(COLORS.values(), 1):
        for mask, line in ((reference, "white"), (segmentation, color)):
            if (mask == value).any():
                axis.contour(mask == value, [0.5], colors=line, linewidths=1.1)
    axis.set(xticks=[], yticks=[])


def _read_array(file: Path) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
