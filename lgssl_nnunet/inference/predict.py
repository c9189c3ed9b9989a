"""Segment images with a trained model: the function behind `lgssl_predict`."""

from __future__ import annotations

import logging
import os
import platform
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lgssl_nnunet.errors import LGSSLError, UsageError
from lgssl_nnunet.files import read_json_if_valid, warn_if_disk_is_full, write_json
from lgssl_nnunet.inference.cases import ImageRules, Inputs, collect_images, segmentation_problem
from lgssl_nnunet.inference.classes import chosen_classes
from lgssl_nnunet.inference.device import choose_device
from lgssl_nnunet.inference.models import FINAL_CHECKPOINT, ChosenModel, select_model
from lgssl_nnunet.inference.predictor import Case, LGSSLPredictor, remove_leftovers, resolve_precision
from lgssl_nnunet.inference.selection_maps import SelectionMapPredictor, require_float_format, selection_map_files
from lgssl_nnunet.inference.sides import require_same_sides
from lgssl_nnunet.inference.stored_model import image_rules
from lgssl_nnunet.locks import hold_lock
from lgssl_nnunet.problems import first_of

logger = logging.getLogger(__name__)

_MOST_NAMED = 3

RECORD = "lgssl_prediction.json"
DEFAULT_WORKERS = min(3, os.cpu_count() or 1)
_VERSIONS = ("lgssl_nnunet", "nnunetv2", "torch", "numpy", "SimpleITK")


class PredictionError(LGSSLError):
    """Some cases could not be segmented; the message names each with its reason."""

    exit_code = 1


@dataclass(frozen=True)
class _Call:
    """What a call wants with its output folder.

    Attributes:
        output: the folder.
        cases: those of this part.
        all_cases: those of all parts.
        records: the files that say what made the segmentations, by name.
        overwrite: replace what is there.
        continue_prediction: keep what is there.
        save_selection_maps: selection maps are written as well.
    """

    output: Path
    cases: Sequence[Case]
    all_cases: Sequence[Case]
    records: dict[str, dict[str, Any]]
    overwrite: bool
    continue_prediction: bool
    save_selection_maps: bool


def predict(
    input: Inputs,
    output: str | Path,
    *,
    dataset: int | str | None = None,
    configuration: str | None = None,
    folds: Sequence[int | str] | None = None,
    plans: str | None = None,
    trainer: str | None = None,
    checkpoint: str = FINAL_CHECKPOINT,
    model_folder: str | Path | None = None,
    precision: str = "auto",
    step_size: float = 0.5,
    disable_tta: bool = False,
    classes: Sequence[str] | None = None,
    save_probabilities: bool = False,
    save_selection_maps: bool = False,
    continue_prediction: bool = False,
    overwrite: bool = False,
    num_processes_preprocessing: int = DEFAULT_WORKERS,
    num_processes_segmentation_export: int = DEFAULT_WORKERS,
    num_parts: int = 1,
    part_id: int = 0,
    device: str | torch.device | None = None,
    not_on_device: bool = False,
    trust_checkpoint: bool = False,
    prev_stage_predictions: str | Path | None = None,
    verbose: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Segment images with a trained model and write the segmentations in the geometry of the images.

    The arguments carry the names and meanings of nnU-Net's command. With worker processes (the default for more
    than one image) a script needs the usual `if __name__ == "__main__":` around its code.

    Args:
        input: an image file, a folder of `<case>_<channel><ending>` files, or a list of channel files per case.
        output: folder for `<case><ending>`; made if missing. It also gets dataset.json, plans.json,
            predict_from_raw_data_args.json (as nnU-Net leaves them) and lgssl_prediction.json (what was used).
        dataset: id or name; needed only if models of several datasets are there.
        configuration: for example 3d_fullres.
        folds: the folds to average; by default all finished ones, or `all` alone where it is there.
        plans: plans identifier.
        trainer: trainer class name.
        checkpoint: file name of the checkpoint.
        model_folder: use this model folder or bundle instead of looking in nnUNet_results.
        precision: "auto" (the fastest that the device computes natively), "stock" (to the voxel what nnUNetv2_predict
            writes), "fp32", "bf16" or "fp16".
        step_size: distance of neighbouring windows as a fraction of the patch, over 0 up to 1.
        disable_tta: do not average over mirrored images; up to 8 times faster, a little worse.
        classes: names of the classes or regions that segmentations hold, with their values in dataset.json; None for
            all. Every voxel is decided over all classes, and what the others win becomes background.
        save_probabilities: also write `<case>.npz` and `<case>.pkl`, for nnUNetv2_ensemble; those of all classes.
        save_selection_maps: also write `selection_maps/<case><ending>`, where the text-vision fusion of LGSSLTrainer
            lets its feature pass (float32, 0 to 1, 0 outside of what preprocessing crops to), and a picture of it,
            `selection_maps/<case>.png`. The network works about a third longer; segmentations are the same to the bit.
        continue_prediction: skip cases that `output` already holds, whole and on their image's grid. Where only the
            selection map is missing, it is made and the segmentation stays; of others that are predicted, nothing old.
        overwrite: replace what `output` already holds of the cases; it is removed before they are predicted.
        num_processes_preprocessing: worker processes that read and resample images.
        num_processes_segmentation_export: worker processes that resample and write; 0 and 0: all in this process.
        num_parts: split the cases over this many calls.
        part_id: which part this call is, from 0.
        device: cpu, cuda, cuda:1 or mps; by default the best there is.
        not_on_device: keep the logits in RAM instead of GPU memory.
        trust_checkpoint: read a checkpoint that holds more than tensors and numbers, and run what it asks for.
        prev_stage_predictions: refused; cascades are not supported.
        verbose: let nnU-Net print what it does.
        progress: show a bar per image (only on a terminal).

    Returns:
        The segmentation of each case of this part, in alphabetical order.

    Raises:
        UsageError: arguments that do not fit, several datasets to choose from, a class that the model does not have, an
            output that would be lost, or selection maps of a model without prompts or in a format without fractions.
        CheckpointError: no finished model, or a damaged one.
        DatasetError: images that do not fit the model, or lie otherwise than its own where classes have sides; all
            problems together.
        FolderBusyError: another call is predicting into `output`.
        PredictionError: cases that failed, after all others were written.
    """
    _check_arguments(step_size, num_parts, part_id, prev_stage_predictions, continue_prediction and overwrite)
    device = choose_device(device)
    precision = resolve_precision(precision, device)
    chosen = select_model(model_folder, dataset, trainer, plans, configuration, folds, checkpoint)
    rules, classes = _announce(chosen, classes)
    output = Path(output).expanduser()
    all_cases = _cases(input, output, rules, save_selection_maps)
    cases = all_cases[part_id::num_parts]
    predictor = (SelectionMapPredictor if save_selection_maps else LGSSLPredictor)(
        device,
        precision=precision,
        step_size=step_size,
        use_mirroring=not disable_tta,
        perform_everything_on_device=not not_on_device,
        verbose=verbose,
        progress=progress and sys.stderr.isatty(),
    )
    predictor.load_model(chosen.folder, chosen.folds, chosen.checkpoint, trust_checkpoint, classes)
    options = {
        "save_probabilities": save_probabilities,
        "num_processes_preprocessing": num_processes_preprocessing,
        "num_processes_segmentation_export": num_processes_segmentation_export,
    }
    records = _records(chosen, predictor, classes)
    call = _Call(output, cases, all_cases, records, overwrite, continue_prediction, save_selection_maps)
    with _reserved(call, part_id, num_parts):
        todo = _continued(cases, rules, save_probabilities, save_selection_maps) if continue_prediction else cases
        logger.info("%d case(s) to predict, %d already there", len(todo), len(cases) - len(todo))
        _predict_all(predictor, todo, output, options)
    return [case.output for case in cases]


def _announce(chosen: ChosenModel, classes: Sequence[str] | None) -> tuple[ImageRules, tuple[str, ...] | None]:
    """Say which model predicts, and return what it expects of images and which of its classes are written."""
    logger.info("Model: %s", chosen)
    dataset_json = chosen.model.read_json("dataset.json")
    plans = chosen.model.read_json("plans.json")
    unseen = plans.get("lgssl", {}).get("unseen_classes", [])
    if unseen and classes is None:
        logger.warning(
            "The model was never trained on %s: what it segments as such means nothing.", " and ".join(unseen)
        )
    return image_rules(plans, dataset_json, chosen.folder), chosen_classes(classes, dataset_json, unseen)


@contextmanager
def _reserved(call: _Call, part_id: int, num_parts: int) -> Iterator[None]:
    """Hold the lock of an output folder, which gets the records; calls with other parts may work beside this one.

    The folder is checked before anything is written there, and again when no other call can write. Results that are to
    be replaced are removed before the records change, so that none ever lies under those of another model.
    """
    _check_output(call)
    with hold_lock(call.output / f".lgssl_predict_{part_id}_of_{num_parts}.lock", call.output):
        with hold_lock(call.output / ".lgssl_predict_records.lock", call.output, wait=True):
            _check_output(call)
            if call.overwrite:
                _remove_results(call)
            for name, record in call.records.items():
                write_json(record, call.output / name)
        yield


def _arguments(cases: Sequence[Case], output: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return what nnU-Net writes into predict_from_raw_data_args.json, under its names."""
    return {
        "list_of_lists_or_source_folder": [[str(file) for file in case.files] for case in cases],
        "output_folder_or_list_of_truncated_output_files": str(output),
        **options,
        "overwrite": True,
        "folder_with_segs_from_prev_stage": None,
        "num_parts": 1,
        "part_id": 0,
    }


def _predict_all(predictor: LGSSLPredictor, cases: Sequence[Case], output: Path, options: dict[str, Any]) -> None:
    """Segment the cases, one alone without worker processes, and raise at the end if some failed."""
    write_json(_arguments(cases, output, options), output / "predict_from_raw_data_args.json")
    for case in cases:
        remove_leftovers(case)
    if len(cases) == 1:
        options = {**options, "num_processes_preprocessing": 0, "num_processes_segmentation_export": 0}
    failures = predictor.predict_files(cases, **options)
    if failures:
        warn_if_disk_is_full(output)
        listing = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        written = len(cases) - len(failures)
        raise PredictionError(f"{len(failures)} case(s) failed, {written} are written:\n{listing}")
    logger.info("Segmentations are in %s", output)


def _check_arguments(
    step_size: float, num_parts: int, part_id: int, prev_stage_predictions: str | Path | None, both: bool
) -> None:
    if prev_stage_predictions is not None:
        raise UsageError("-prev_stage_predictions belongs to cascades, which lgssl_predict does not run; leave it out.")
    if not 0 < step_size <= 1:
        raise UsageError(f"-step_size {step_size}: it is a fraction of the patch, over 0 and at most 1; 0.5 is usual.")
    if num_parts < 1 or not 0 <= part_id < num_parts:
        raise UsageError(f"-part_id {part_id} must be from 0 to {max(num_parts - 1, 0)} with -num_parts {num_parts}.")
    if both:
        raise UsageError("--continue_prediction keeps existing segmentations and --overwrite replaces them; give one.")


def _cases(inputs: Inputs, output: Path, rules: ImageRules, save_selection_maps: bool) -> list[Case]:
    """Return the cases of the input in alphabetical order, checked against the model and the output folder."""
    ending = rules.file_ending
    if save_selection_maps:
        require_float_format(rules.reader, ending)
    if output.is_file() or output.name.endswith(ending):
        raise UsageError(f"-o {output} is a file; give the folder that the segmentations go to.")
    images = collect_images(inputs, rules)
    require_same_sides([files[0] for files in images.values()], rules)
    if output.resolve() in {file.parent.resolve() for files in images.values() for file in files}:
        raise UsageError(f"-o {output} is the folder of the images; choose another, so that no image is overwritten.")
    return [Case(name, files, output / f"{name}{ending}") for name, files in images.items()]


def _continued(
    cases: Sequence[Case], rules: ImageRules, save_probabilities: bool, save_selection_maps: bool
) -> list[Case]:
    """Return the cases that lack a wanted file, marked where only the selection map has to be made.

    Of those to be segmented again no map and no probabilities stay, which would pass for those of the new segmentation;
    a whole segmentation that lacks probabilities alone stays, with its maps, until the same one replaces it.
    """
    marked = []
    for case in cases:
        is_whole = _is_whole(case, rules)
        is_segmented = is_whole and (not save_probabilities or _has_probabilities(case))
        if not is_segmented:
            _remove(_probability_files(case) if is_whole else [case.output, *_beside_segmentation(case)])
        marked.append(replace(case, is_segmented=is_segmented))
    return [case for case in marked if not case.is_segmented or (save_selection_maps and not _has_map(case))]


def _is_whole(case: Case, rules: ImageRules) -> bool:
    """Whether the segmentation is there and can be kept; what is there and damaged is told."""
    if not case.output.is_file():
        return False
    problem = segmentation_problem(case.output, case.files[0], rules)
    if problem:
        logger.warning("%s %s; it is predicted again.", case.output, problem)
    return not problem


def _has_probabilities(case: Case) -> bool:
    archive, properties = _probability_files(case)
    return _is_whole_archive(archive) and properties.is_file()


def _probability_files(case: Case) -> tuple[Path, Path]:
    archive = case.output.with_name(f"{case.name}.npz")
    return archive, archive.with_suffix(".pkl")


def _is_whole_archive(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _has_map(case: Case) -> bool:
    return all(file.is_file() for file in selection_map_files(case))


def _records(
    chosen: ChosenModel, predictor: LGSSLPredictor, classes: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Return the files that go beside the segmentations: nnU-Net's two, and what made the segmentations.

    All of `model` and `settings` decides voxels, the rest is for people. `classes` is there only where not all are
    written: folders that other releases wrote can be continued.
    """
    made_by = {
        "model": {
            "folder": str(chosen.folder.resolve()),
            "dataset": chosen.model.dataset,
            "trainer": predictor.trainer_name,
            "plans": predictor.plans_manager.plans_name,
            "configuration": chosen.model.configuration,
            "folds": list(chosen.folds),
            "checkpoint": chosen.checkpoint,
            "checkpoint_written": _utc(chosen.model.modified(chosen.checkpoint)),
        },
        "settings": {
            "precision": predictor.precision,
            "step_size": predictor.tile_step_size,
            "mirroring_axes": list(predictor.allowed_mirroring_axes or ()) if predictor.use_mirroring else [],
            **({} if classes is None else {"classes": list(classes)}),
        },
        "chosen_because": chosen.reason,
        "device": str(predictor.device),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
    }
    return {"dataset.json": predictor.dataset_json, "plans.json": predictor.plans_manager.plans, RECORD: made_by}


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).isoformat(timespec="seconds")


def _check_output(call: _Call) -> None:
    """Refuse to write where something would be lost, or files that do not belong together would be mixed.

    Raises:
        UsageError: with the ways out.
    """
    foreign = _foreign_record(call)
    if foreign is not None and not call.overwrite:
        raise UsageError(
            f"{foreign} comes from another dataset, model or setting{_what_differs(foreign, call)}; choose another "
            "output folder, or replace what is there with --overwrite."
        )
    if foreign is not None or not (call.output / RECORD).exists():
        _refuse_unexplained(call)
    if call.overwrite or call.continue_prediction:
        return
    wanted = [
        file
        for case in call.cases
        for file in (case.output, *(selection_map_files(case) if call.save_selection_maps else ()))
    ]
    existing = [str(file.relative_to(call.output)) for file in wanted if file.exists()]
    if existing:
        raise UsageError(
            f"{call.output} already holds {first_of(existing, _MOST_NAMED)}: add --continue_prediction to keep them "
            "and predict the rest, --overwrite to replace them, or choose another output folder."
        )


def _foreign_record(call: _Call) -> Path | None:
    """Return a file of an output folder that tells of another dataset, model or setting, None if there is none."""
    for name, record in call.records.items():
        file = call.output / name
        if file.exists() and _identity(_stored_record(file)) != _identity(record):
            return file
    return None


def _what_differs(file: Path, call: _Call) -> str:
    """Return in brackets which settings of a foreign record are others than these; empty if it is not in them."""
    found = [record.get("settings") for record in (_stored_record(file), call.records[file.name])]
    there, asked = (settings if isinstance(settings, dict) else {} for settings in found)
    names = [name for name in {**there, **asked} if there.get(name) != asked.get(name)]
    told = [f"{name}: {_words(there.get(name))} there, {_words(asked.get(name))} asked" for name in names]
    return f" ({'; '.join(told)})" if told else ""


def _words(value: Any) -> str:
    if value is None:
        return "not given"
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _stored_record(file: Path) -> dict[str, Any]:
    content = read_json_if_valid(file)
    return content if isinstance(content, dict) else {}


def _refuse_unexplained(call: _Call) -> None:
    """Refuse a folder whose segmentations stay, although its records will say that this model made them."""
    ending = call.all_cases[0].output.name.removeprefix(call.all_cases[0].name)
    there = sorted(file.name for file in call.output.glob(f"[!.]*{ending}") if file.is_file())
    others = set(there) - {case.output.name for case in call.all_cases}
    kept = sorted(others) if call.overwrite else there
    if kept:
        way_out = "choose another output folder" + ("" if others else ", or replace them with --overwrite")
        raise UsageError(
            f"{call.output} holds {first_of(kept, _MOST_NAMED)}, of which no {RECORD} says that this model made them "
            f"with these settings; {way_out}."
        )


def _remove_results(call: _Call) -> None:
    """Remove what is there of the cases of a call.

    Of another model nothing stays, in no part. Under the records of this one other parts may be at work, so only the
    results of this part go.
    """
    is_ours = (call.output / RECORD).exists() and _foreign_record(call) is None
    for case in call.cases if is_ours else call.all_cases:
        _remove([case.output, *_beside_segmentation(case)])


def _beside_segmentation(case: Case) -> list[Path]:
    return [*_probability_files(case), *selection_map_files(case)]


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a record that must agree; all of it, except that our own also names device and versions."""
    return {key: record.get(key) for key in ("model", "settings")} if "settings" in record else record
