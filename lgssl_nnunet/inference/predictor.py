"""nnU-Net's sliding-window predictor with our trainers, a choice of arithmetic, and cases that fail one by one."""

from __future__ import annotations

import glob
import itertools
import logging
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from traceback import clear_frames
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn
from tqdm import tqdm

from lgssl_nnunet.data.preprocessing import recipe_of
from lgssl_nnunet.dataset_conversion.volumes import require_intact, require_whole_nifti
from lgssl_nnunet.engine.precision import cpu_has_bf16, preferred_memory_format
from lgssl_nnunet.errors import LGSSLError, UsageError
from lgssl_nnunet.files import move_into_place
from lgssl_nnunet.inference.classes import PlansForClasses
from lgssl_nnunet.inference.export import can_export_by_slabs, write_segmentation
from lgssl_nnunet.inference.models import FINAL_CHECKPOINT
from lgssl_nnunet.inference.reading import finite, read_preprocessed
from lgssl_nnunet.inference.stored_model import read_stored_model
from lgssl_nnunet.parallel import DIED_ALONE
from lgssl_nnunet.workers import WorkerDiedError, WorkerPool

logger = logging.getLogger(__name__)

PRECISIONS = ("auto", "stock", "fp32", "bf16", "fp16")
_PARTIAL = ".partial_"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

VIEWS_AT_ONCE = 2
"""Mirrored windows in one pass: a single one takes torch's slow 3D convolution on CPUs in fp32 (up to 4 times)."""


@dataclass(frozen=True)
class Case:
    """One image to segment.

    Attributes:
        name: the case id, which names the segmentation.
        files: the image files, one per channel, in channel order.
        output: the segmentation's path.
        is_segmented: whether the segmentation is there and stays, so that only what goes with it is made.
    """

    name: str
    files: tuple[Path, ...]
    output: Path
    is_segmented: bool = False


@dataclass
class _Outcome:
    """What became of the cases that are not written: why they failed, and whose worker process died."""

    failures: dict[str, str] = field(default_factory=dict)
    died: list[Case] = field(default_factory=list)


class LogitsError(LGSSLError):
    """The network gives logits that are no numbers."""

    exit_code = 1


class LGSSLPredictor(nnUNetPredictor):
    """nnU-Net's predictor; with precision "stock" its arithmetic is untouched.

    Args:
        device: where the network runs.
        precision: "stock" (nnU-Net's arithmetic, window by window), or what convolutions are computed in, with fp32
            accumulation, several views at once and export by slabs: "fp32", "bf16", "fp16" (CUDA), or "auto", the
            fastest of these on `device`.
        step_size: distance of neighbouring windows as a fraction of the patch, over 0 up to 1.
        use_mirroring: average over mirrored images, along the axes the checkpoint allows.
        perform_everything_on_device: keep image and logits on the GPU (CUDA only).
        verbose: let nnU-Net print what it does.
        progress: show a bar over the windows.

    Raises:
        UsageError: the precision is unknown or the device does not compute it natively.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        precision: str = "stock",
        step_size: float = 0.5,
        use_mirroring: bool = True,
        perform_everything_on_device: bool = True,
        verbose: bool = False,
        progress: bool = True,
    ):
        self.precision = resolve_precision(precision, device)
        # nnU-Net announces on stdout that CPUs keep the logits in RAM, which nobody asked it to do otherwise.
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            super().__init__(
                tile_step_size=step_size,
                use_mirroring=use_mirroring,
                perform_everything_on_device=perform_everything_on_device,
                device=device,
                verbose=verbose,
                verbose_preprocessing=verbose,
                allow_tqdm=progress,
            )

    def load_model(
        self,
        folder: str | Path,
        folds: Sequence[int | str],
        checkpoint_name: str = FINAL_CHECKPOINT,
        trust: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        """Build the network of a model and load the weights of its folds, whose logits are averaged.

        Args:
            folder: a model folder of nnU-Net's layout, or a bundle.
            folds: the folds to use.
            checkpoint_name: the checkpoint's file name.
            trust: as for `read_checkpoint`.
            classes: the classes that segmentations hold; None for all.

        Raises:
            CheckpointError: a file is missing or damaged or holds more than numbers, the plans name a class that is no
                network's, or the weights do not fit the network.
            UsageError: the trainer is unknown, or the configuration is a cascade.
        """
        stored = read_stored_model(folder, folds, checkpoint_name, trust)
        plans = stored.plans_manager
        self.manual_initialization(
            stored.network_with_weights(),
            plans if classes is None else PlansForClasses(plans.plans, classes),
            stored.configuration_manager,
            list(stored.weights.values()),
            stored.dataset_json,
            stored.trainer,
            stored.mirroring_axes,
        )

    def manual_initialization(
        self,
        network: nn.Module,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        parameters: list[dict[str, Tensor]] | None,
        dataset_json: dict,
        trainer_name: str,
        inference_allowed_mirroring_axes: Sequence[int] | None,
    ) -> None:
        """Take over a network as nnU-Net does; no axis to mirror means no mirroring instead of an error."""
        stock = self.precision == "stock"
        self.recipe = None if stock else recipe_of(plans_manager, configuration_manager, dataset_json)
        if not stock:
            network.to(memory_format=self._memory_format(configuration_manager))
        super().manual_initialization(
            network,
            plans_manager,
            configuration_manager,
            parameters,
            dataset_json,
            trainer_name,
            tuple(inference_allowed_mirroring_axes) if inference_allowed_mirroring_axes else None,
        )

    def predict_files(
        self,
        cases: Sequence[Case],
        *,
        save_probabilities: bool = False,
        num_processes_preprocessing: int = 0,
        num_processes_segmentation_export: int = 0,
    ) -> dict[str, str]:
        """Segment cases and write the files; a case that fails does not stop the others.

        Each file is written under another name first and then moved, so that a killed run leaves no half file. A case
        whose worker process dies is tried once more after the others, alone.

        Args:
            cases: what to segment and where to write.
            save_probabilities: also write `<case>.npz` and `<case>.pkl`, as nnU-Net does for ensembles.
            num_processes_preprocessing: worker processes that read and resample, at most one for each case after the
                first, because they take seconds to start; 0 does it in this process.
            num_processes_segmentation_export: workers that resample back and write, threads where export by slabs
                leaves little to do, processes elsewhere; 0 does it here.

        Returns:
            The problem of each case that failed, by case name; empty when all are written.
        """
        outcome = _Outcome()
        waiting: deque[tuple[Case, Future]] = deque()
        num_readers = max(0, min(num_processes_preprocessing, len(cases) - 1))
        writing = self._writers(num_processes_segmentation_export, save_probabilities)
        with processes(num_readers) as readers, writing as writers:
            for case, future in self._preprocessed(cases, readers, num_readers):
                # Finished logits are the largest arrays of all: at most one per writer may wait in memory.
                while len(waiting) > num_processes_segmentation_export:
                    _collect(*waiting.popleft(), outcome)
                logger.info("Predicting %s (%d of %d)", case.name, cases.index(case) + 1, len(cases))
                job = _attempt(case, lambda case=case, ready=future: self._infer(case, *ready.result()), outcome)
                if job is not None:
                    waiting.append((case, writers.submit(_export, self, *job, case, save_probabilities)))
            for item in waiting:
                _collect(*item, outcome)
        again = _Outcome(outcome.failures)
        for case in outcome.died:
            self._predict_alone(case, save_probabilities, again)
        compute_gaussian.cache_clear()
        return again.failures | dict.fromkeys((case.name for case in again.died), DIED_ALONE)

    def _predict_alone(self, case: Case, save_probabilities: bool, outcome: _Outcome) -> None:
        """Segment a case when no other takes memory, in a process of its own so that its death is not this one's."""
        with processes(1) as worker:
            ready = self._read(case, worker)
            job = _attempt(case, lambda: self._infer(case, *ready.result()), outcome)
            if job is not None:
                _collect(case, worker.submit(_export, self, *job, case, save_probabilities), outcome)

    def _writers(self, workers: int, save_probabilities: bool) -> Executor:
        # A process would get a copy of the logits, the largest array of all.
        in_threads = self._exports_by_slabs() and not save_probabilities and workers > 0
        return ThreadPoolExecutor(workers) if in_threads else processes(workers)

    def __getstate__(self) -> dict[str, Any]:
        """Leave network and weights behind when a worker process gets this object: it only writes files."""
        return {**self.__dict__, "network": None, "list_of_parameters": None}

    def _preprocessed(
        self, cases: Sequence[Case], readers: Executor, ahead: int
    ) -> Iterator[tuple[Case, Future[tuple[np.ndarray, dict]]]]:
        """Yield cases in order with the preprocessing of at most `ahead` later ones under way.

        The first case is preprocessed in this process, while the workers start.
        """
        later = iter(cases[1:])
        waiting = deque((case, self._read(case, readers)) for case in itertools.islice(later, ahead))
        for case in cases[:1]:
            yield case, self._read(case, _InProcess())
        for case in later:
            waiting.append((case, self._read(case, readers)))
            yield waiting.popleft()
        yield from waiting

    def _read(self, case: Case, reader: Executor) -> Future[tuple[np.ndarray, dict]]:
        """Have a case read and preprocessed, by a function that needs no torch where the plans allow it."""
        if self.recipe is None:
            return reader.submit(_preprocess_as_nnunet, self, case)
        return reader.submit(read_preprocessed, case.files, self.recipe)

    def _infer(self, case: Case, data: np.ndarray, properties: dict) -> tuple[dict[str, np.ndarray], dict]:
        """Return what the network makes of a preprocessed image (M, X, Y, Z), and the properties of the image.

        Here that is `logits` (C, X, Y, Z), and nothing if the case is segmented.
        """
        return {} if case.is_segmented else {"logits": self._logits(data)}, properties

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Return the logits (C, X, Y, Z) of a preprocessed image (M, X, Y, Z), in fp32 where half precision overflows.

        Raises:
            LogitsError: the network gives NaN or infinity, of which a decision would make background.
        """
        logits = super().predict_logits_from_preprocessed_data(data)
        if _are_finite(logits):
            return logits
        if self.precision not in _HALF:
            remedy = "use --precision fp32" if self.precision == "stock" else "look for extreme values in the image"
            raise LogitsError(f"The network gives NaN or infinity in precision {self.precision}; {remedy}.")
        del logits
        logger.warning("The network gives NaN or infinity in %s; the case is predicted again in fp32.", self.precision)
        precision, self.precision = self.precision, "fp32"
        try:
            return self.predict_logits_from_preprocessed_data(data)
        finally:
            self.precision = precision

    def _logits(self, data: np.ndarray) -> np.ndarray:
        """Return the logits (C, X, Y, Z) of a preprocessed image (M, X, Y, Z)."""
        return self.predict_logits_from_preprocessed_data(torch.from_numpy(data)).cpu().numpy()

    def _write(
        self, folder: Path, case: Case, results: dict[str, np.ndarray], properties: dict, save_probabilities: bool
    ) -> None:
        """Write into `folder` what `_infer` returned, resampled to the image's grid."""
        if "logits" not in results:
            return
        if self._exports_by_slabs() and not save_probabilities:
            write_segmentation(
                torch.from_numpy(results["logits"]),
                properties,
                self.configuration_manager,
                self.plans_manager,
                self.label_manager,
                folder / f"{case.name}{self.dataset_json['file_ending']}",
            )
        else:
            export_prediction_from_logits(
                results["logits"],
                properties,
                self.configuration_manager,
                self.plans_manager,
                self.dataset_json,
                str(folder / case.name),
                save_probabilities,
            )

    def _exports_by_slabs(self) -> bool:
        return self.precision != "stock" and can_export_by_slabs(self.configuration_manager)

    def _flips(self) -> list[tuple[int, ...]]:
        """Return the spatial axes, counted from the front of a channel, that each mirrored copy flips."""
        axes = (self.allowed_mirroring_axes or ()) if self.use_mirroring else ()
        return [flip for size in range(len(axes) + 1) for flip in itertools.combinations(axes, size)]

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Sequence[tuple], do_on_device: bool = True
    ) -> Tensor:
        """Return logits (C, X, Y, Z) of a padded image (M, X, Y, Z), accumulated in fp32 unless "stock"."""
        if self.precision == "stock":
            return super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
        device = self.device if do_on_device else torch.device("cpu")
        try:
            return self._sum_of_windows(data, slicers, device)
        except RuntimeError as error:
            # nnU-Net tries again in RAM while it handles the error, whose traceback holds the arrays of this try.
            clear_frames(error.__traceback__)
            empty_cache(self.device)
            raise

    def _sum_of_windows(self, data: Tensor, slicers: Sequence[tuple], device: torch.device) -> Tensor:
        """Return the mean of mirrored and overlapping windows, weighted by their distance from the window's border."""
        window = compute_gaussian(tuple(self.configuration_manager.patch_size), dtype=torch.float32, device=device)
        logits = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), device=device)
        weight = torch.zeros(data.shape[1:], device=device)
        views = [(position, flip) for position in slicers for flip in self._flips()]
        with torch.inference_mode():
            for start in tqdm(range(0, len(views), VIEWS_AT_ONCE), disable=not self.allow_tqdm):
                some = views[start : start + VIEWS_AT_ONCE]
                for (position, _), prediction in zip(some, self._predict_views(data, some), strict=True):
                    logits[position] += prediction.to(device).mul_(window)
                    weight[position[1:]] += window
        return logits.div_(weight)

    def _predict_views(self, data: Tensor, views: Sequence[tuple[tuple, tuple[int, ...]]]) -> list[Tensor]:
        """Return the logits (C, *S) in fp32 of mirrored windows of an image (M, X, Y, Z), mirrored back."""
        patches = [torch.flip(data[position].to(self.device), _behind_channels(flip)) for position, flip in views]
        batch = torch.stack(patches).contiguous(memory_format=self._memory_format(self.configuration_manager))
        with self._autocast():
            predictions = self.network(batch)
        pairs = zip(predictions, views, strict=True)
        return [torch.flip(prediction.float(), _behind_channels(flip)) for prediction, (_, flip) in pairs]

    def _autocast(self) -> AbstractContextManager:
        if self.precision in _HALF:
            return torch.autocast(self.device.type, dtype=_HALF[self.precision])
        return _exact_on_cuda() if self.device.type == "cuda" else nullcontext()

    def _memory_format(self, configuration_manager: ConfigurationManager) -> torch.memory_format:
        return preferred_memory_format(self.device, len(configuration_manager.patch_size))


@contextmanager
def _exact_on_cuda() -> Iterator[None]:
    """Compute in fp32: without the fp16 autocast that nnU-Net opens around the sliding window, and without TF32.

    TF32, which cuDNN takes for convolutions unless told otherwise, rounds what is multiplied to 10 bits.
    """
    cudnn = torch.backends.cudnn
    # Since torch 2.9 convolutions have a switch of their own; where it was used, reading the older one may fail.
    switch, name, exact = (
        (cudnn.conv, "fp32_precision", "ieee") if hasattr(cudnn, "conv") else (cudnn, "allow_tf32", False)
    )
    before = getattr(switch, name)
    setattr(switch, name, exact)
    try:
        with torch.autocast("cuda", enabled=False):
            yield
    finally:
        setattr(switch, name, before)


def _are_finite(logits: Tensor) -> bool:
    """Whether no logit (C, X, Y, Z) is NaN or infinite, without another array of that size."""
    return all(bool(torch.stack(channel.aminmax()).isfinite().all()) for channel in logits)


def _behind_channels(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis + 1 for axis in axes)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision that is meant by "auto"; refuse one that is unknown or that `device` would only emulate.

    Raises:
        UsageError: with the precisions that work.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision} is unknown; use {', '.join(PRECISIONS)}.")
    if precision == "auto":
        return "fp16" if device.type == "cuda" else "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    native = {
        ("cuda", "fp16"): lambda: True,
        ("cuda", "bf16"): lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        ("cpu", "bf16"): cpu_has_bf16,
    }.get((device.type, precision), lambda: precision not in _HALF)
    if not native():
        raise UsageError(
            f"--precision {precision}: {device} does not compute in {_HALF[precision]} natively (emulated it is many "
            "times slower than fp32); use --precision auto, fp32 or stock."
        )
    return precision


def _preprocess_as_nnunet(predictor: LGSSLPredictor, case: Case) -> tuple[np.ndarray, dict]:
    """Read and preprocess one case by the class that the plans name; runs in a worker process or in this one."""
    for file in case.files:
        require_intact(file)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=predictor.verbose_preprocessing)
    planned = predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
    data, _, properties = preprocessor.run_case([str(file) for file in case.files], None, *planned)
    return finite(data, case.files), properties


def _export(
    predictor: LGSSLPredictor, results: dict[str, np.ndarray], properties: dict, case: Case, save_probabilities: bool
) -> None:
    """Write the files of a case and move all of them into place; runs in a worker process or in this one."""
    output = case.output.parent
    output.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{case.name}_", dir=output))
    try:
        predictor._write(partial, case, results, properties, save_probabilities)
        # The segmentation moves last: where it exists, --continue_prediction skips the case.
        written = sorted(filter(Path.is_file, partial.rglob("*")), key=lambda file: file == partial / case.output.name)
        targets = {file: output / file.relative_to(partial) for file in written}
        for file, target in targets.items():
            require_whole_nifti(file)  # on a full disk ITK writes the beginning of a NIfTI file and reports no error
            target.parent.mkdir(exist_ok=True)
        move_into_place(targets)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_leftovers(case: Case) -> None:
    """Remove what a killed process left of a case; nothing may be working on it."""
    random = "?" * 8  # as many letters as mkdtemp adds: `a_*` would fit the folders of a case a_b as well
    for folder in case.output.parent.glob(f"{_PARTIAL}{glob.escape(case.name)}_{random}"):
        shutil.rmtree(folder, ignore_errors=True)


class _InProcess(Executor):
    """Executor that does the work at once, in this process."""

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


def processes(workers: int) -> Executor:
    """Return an executor with so many processes; with 0, one that works in this process."""
    return WorkerPool(workers) if workers > 0 else _InProcess()


def _collect(case: Case, future: Future, outcome: _Outcome) -> None:
    _attempt(case, future.result, outcome)


def _attempt(case: Case, work: Callable[[], Any], outcome: _Outcome) -> Any:
    """Return what `work` returns; a failure or the death of a worker process is noted and None returned."""
    try:
        return work()
    except WorkerDiedError as error:
        outcome.died.append(case)
        logger.warning("Case %s: %s.", case.name, error)
    except Exception as error:
        reason = str(error) if isinstance(error, LGSSLError) else f"{type(error).__name__}: {error}".rstrip(": ")
        outcome.failures[case.name] = reason
        logger.error("Case %s failed: %s", case.name, reason)
        logger.debug("Case %s failed here:", case.name, exc_info=True)
    return None
