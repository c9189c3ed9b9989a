"""Preprocessing of labelled and unlabelled cases, redone only where something has changed.

On disk, in the folder of the dataset in `nnUNet_preprocessed`:

- `<data_identifier>/`: the labelled cases, exactly as nnU-Net writes them;
- `<data_identifier>_unlabeled/`: `CASE.b2nd` and `CASE.pkl` of the unlabelled ones, image only;
- `<data_identifier>.manifest.json`: from which files and settings each case was made;
- `gt_segmentations/`: copies of the labels of labelled cases, for validation.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from lgssl_nnunet.data.partial_labels import PartialLabel
from lgssl_nnunet.data.preprocessing import (
    PreprocessedCase,
    Recipe,
    clear_outside,
    hide_locations,
    preprocess,
    recipe_of,
)
from lgssl_nnunet.files import (
    content_hash,
    copy_file,
    environment,
    file_record,
    file_signature,
    is_unchanged,
    move_into_place,
    read_json_if_valid,
    warn_if_disk_is_full,
    write_json,
)
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.plans.cases import Case, RawDataset
from lgssl_nnunet.plans.partial_labels import label_readings, partial_labels
from lgssl_nnunet.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)

LABELED_SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
UNLABELED_SUFFIXES = (".b2nd", ".pkl")
_SECONDS_BETWEEN_MANIFESTS = 10.0
_PLANS_KEYS = (
    "image_reader_writer",
    "transpose_forward",
    "foreground_intensity_properties_per_channel",
    "label_manager",
)
_CONFIGURATION_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
_DATASET_KEYS = ("labels", "regions_class_order", "channel_names")


@dataclass(frozen=True)
class CaseFolders:
    """Where the cases of one configuration lie."""

    labeled: Path
    unlabeled: Path
    unfinished: Path
    manifest: Path

    @classmethod
    def of(cls, preprocessed: Path, data_identifier: str) -> CaseFolders:
        """Return the folders of a data identifier in a dataset's preprocessed folder."""
        return cls(
            labeled=preprocessed / data_identifier,
            unlabeled=preprocessed / f"{data_identifier}_unlabeled",
            unfinished=preprocessed / f"{data_identifier}.unfinished",
            manifest=preprocessed / f"{data_identifier}.manifest.json",
        )

    def files(self, identifier: str, is_labeled: bool) -> list[Path]:
        """Return the files of one preprocessed case."""
        folder = self.labeled if is_labeled else self.unlabeled
        suffixes = LABELED_SUFFIXES if is_labeled else UNLABELED_SUFFIXES
        return [folder / f"{identifier}{suffix}" for suffix in suffixes]

    def sizes(self, is_labeled: bool) -> dict[str, int]:
        """Return the size in bytes of every file of the labelled or the unlabelled cases, by name.

        The folder is listed once: asking for every file takes seconds with ten thousand cases.
        """
        folder = self.labeled if is_labeled else self.unlabeled
        if not folder.is_dir():
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}


def preprocess_configuration(
    dataset: RawDataset,
    plans: dict[str, Any],
    configuration: str,
    preprocessed: Path,
    *,
    clean: bool = False,
    num_processes: int = 0,
    progress: bool = True,
    verbose: bool = False,
) -> int:
    """Preprocess the new and changed cases of one configuration and remove those that no longer belong.

    Args:
        dataset: the raw dataset with the budget applied.
        plans: content of the plans file.
        configuration: name of a configuration in the plans.
        preprocessed: the dataset's folder in `nnUNet_preprocessed`.
        clean: preprocess every case again.
        num_processes: worker processes; 0 for none.
        progress: show a progress bar.
        verbose: name every case that is done; nnU-Net's own preprocessor, where the plans need it, says more.

    Returns:
        Number of cases that were preprocessed now.

    Raises:
        DatasetError: names every case that failed; the others are done and kept.
    """
    folders = CaseFolders.of(preprocessed, plans["configurations"][configuration]["data_identifier"])
    keys = _case_keys(dataset, plans, configuration)
    done = {} if clean else _finished_cases(folders, dataset, keys)
    todo = {name: case for name, case in dataset.cases.items() if name not in done}
    _prepare_folders(folders, dataset)
    write_json(done, folders.manifest)
    logger.info("%s: %d cases to preprocess, %d unchanged.", configuration, len(todo), len(done))
    steps = CaseSteps.of(plans, configuration, dataset.dataset_json, verbose)
    readings = label_readings(dataset)
    tasks = {name: (case, folders, steps, readings.get(name)) for name, case in todo.items()}
    failures: dict[str, CaseFailure] = {}
    last_written = time.monotonic()
    try:
        for name, result in run_cases(
            preprocess_case,
            tasks,
            num_processes=num_processes,
            description=f"Preprocessing {configuration}",
            progress=progress,
            quiet=not verbose,
        ):
            if isinstance(result, CaseFailure):
                failures[name] = result
                continue
            done[name] = keys[name] | {"files": result}
            if verbose:
                logger.info("%s: %s is preprocessed.", configuration, name)
            if time.monotonic() - last_written > _SECONDS_BETWEEN_MANIFESTS:
                write_json(done, folders.manifest)
                last_written = time.monotonic()
    finally:
        shutil.rmtree(folders.unfinished, ignore_errors=True)  # first, since on a full disk it makes room
        _note_finished(done, folders.manifest, bool(failures))
    if failures:
        warn_if_disk_is_full(preprocessed)
    _raise_failures(failures, dataset.name)
    return len(todo)


@dataclass(frozen=True)
class CaseSteps:
    """What is done with every case of a configuration.

    Attributes:
        recipe: None for plans that only nnU-Net's own preprocessor can follow.
        patch_size: for which the files are laid out.
        stock: for that preprocessor: plans, configuration and dataset.json.
        verbose: let that preprocessor print what it does.
    """

    recipe: Recipe | None
    patch_size: tuple[int, ...]
    stock: tuple[dict[str, Any], str, dict[str, Any]] | None
    verbose: bool

    @classmethod
    def of(cls, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], verbose: bool) -> CaseSteps:
        """Read the plans, which imports torch: workers are spared that."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans_manager = PlansManager(plans)
        configuration_manager = plans_manager.get_configuration(configuration)
        recipe = recipe_of(plans_manager, configuration_manager, dataset_json)
        stock = None if recipe else (plans, configuration, dataset_json)
        return cls(recipe, tuple(configuration_manager.patch_size), stock, verbose)


def preprocess_case(
    case: Case, folders: CaseFolders, steps: CaseSteps, partial: PartialLabel | None = None
) -> dict[str, dict[str, Any]]:
    """Preprocess one case into temporary files, move them to their place and return their records by name."""
    targets = folders.files(case.identifier, case.label is not None)
    temporary = {folders.unfinished / target.name: target for target in targets}
    try:
        # blosc2 with several threads stores the same array as different bytes each time; one makes files reproducible.
        with environment({"BLOSC_NTHREADS": "1"}):
            if steps.recipe is None:
                preprocessed = _preprocess_as_planned(case, steps, partial)
            else:
                clear = _is_drawn_unlabeled(case, partial)
                preprocessed = preprocess(case.images, case.label, steps.recipe, partial, clear)
            _save(preprocessed, folders.unfinished / case.identifier, steps.patch_size)
        move_into_place(temporary)
    finally:
        for file in filter(Path.exists, temporary):
            os.truncate(file, 0)  # a writer that failed may still hold the file, and with it room on a full disk
            file.unlink()
    return {target.name: file_record(target) for target in targets}


def _preprocess_as_planned(case: Case, steps: CaseSteps, partial: PartialLabel | None) -> PreprocessedCase:
    """Preprocess one case with the preprocessor class that the plans name."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans, configuration, dataset_json = steps.stock
    plans_manager = PlansManager(plans)
    configuration_manager = plans_manager.get_configuration(configuration)
    preprocessor = configuration_manager.preprocessor_class(verbose=steps.verbose)
    images, label = [str(path) for path in case.images], None if case.label is None else str(case.label)
    settings = (plans_manager, configuration_manager, dataset_json)
    if partial is None:
        image, mask, properties = preprocessor.run_case(images, label, *settings)
    else:  # run_case as well, with the label changed between reading and preprocessing
        reader = plans_manager.image_reader_writer_class()
        image, properties = reader.read_images(images)
        labels = partial.read(reader.read_seg(label)[0])
        image, mask, properties = preprocessor.run_case_npy(image, labels, properties, *settings)
        hide_locations(properties, partial)
    if _is_drawn_unlabeled(case, partial) and any(configuration_manager.use_mask_for_norm):
        clear_outside(image, mask[0], configuration_manager.use_mask_for_norm)
    return PreprocessedCase(image, None if label is None else mask, properties)


def _is_drawn_unlabeled(case: Case, partial: object | None) -> bool:
    return case.label is None or partial is not None


def _save(case: PreprocessedCase, file: Path, patch_size: tuple[int, ...]) -> None:
    """Save a case as nnU-Net does, without a segmentation where it has none."""
    _save_array(case.image.astype(np.float32, copy=False), f"{file}.b2nd", patch_size)
    if case.label is not None:
        _save_array(case.label.astype(np.int16, copy=False), f"{file}_seg.b2nd", patch_size)
    write_pickle(case.properties, f"{file}.pkl")


def _save_array(array: np.ndarray, file: str, patch_size: tuple[int, ...]) -> None:
    blocks, chunks = comp_blosc2_params(array.shape, patch_size, array.itemsize)
    codec, level = blosc2.Codec.LZ4HC, 5
    filters = [nnUNetDatasetBlosc2._select_filter(array, blocks, chunks, codec, level)]
    compression = {"codec": codec, "clevel": level, "filters": filters, "nthreads": 1}
    blosc2.asarray(np.ascontiguousarray(array), urlpath=file, chunks=chunks, blocks=blocks, cparams=compression)


def copy_labels(dataset: RawDataset, preprocessed: Path) -> None:
    """Copy the labels of the labelled cases to `gt_segmentations`, where nnU-Net's validation looks for them.

    Labels of other plans of the same dataset stay; an unchanged copy is left alone.
    """
    folder = preprocessed / "gt_segmentations"
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in dataset.labeled.items():
        target = folder / f"{name}{dataset.file_ending}"
        if not target.exists() or file_signature(target)[1:] != file_signature(case.label)[1:]:
            copy_file(case.label, target)


def sources_of(entry: Any) -> Any:
    """Return what a case was made from, out of its entry in the manifest: all but the records of its files."""
    return {key: value for key, value in entry.items() if key != "files"} if isinstance(entry, dict) else entry


def _case_keys(dataset: RawDataset, plans: Mapping[str, Any], configuration: str) -> dict[str, dict[str, Any]]:
    """Return by case what its preprocessed files depend on."""
    settings = _settings(plans, configuration, dataset.dataset_json)
    partial = {name: {"annotated": list(classes)} for name, classes in partial_labels(dataset).items()}
    return {
        name: {
            "labeled": case.label is not None,
            "images": [file_signature(path) for path in case.images],
            "label": file_signature(case.label) if case.label is not None else None,
            "settings": settings,
            **partial.get(name, {}),
            **_treatment(plans, configuration, _is_drawn_unlabeled(case, partial.get(name))),
        }
        for name, case in dataset.cases.items()
    }


def _treatment(plans: Mapping[str, Any], configuration: str, is_drawn_unlabeled: bool) -> dict[str, Any]:
    """Return what is noted of cases that were once made otherwise from the same files and settings."""
    masked = plans["configurations"][configuration].get("use_mask_for_norm") or ()
    return {"cleared_outside": True} if any(masked) and is_drawn_unlabeled else {}


def _settings(plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]) -> str:
    """Return a hash of everything but the files that preprocessed cases depend on."""
    planned = plans["configurations"][configuration]
    return content_hash(
        [
            {key: plans.get(key) for key in _PLANS_KEYS},
            {key: planned.get(key) for key in _CONFIGURATION_KEYS},
            {key: dataset_json.get(key) for key in _DATASET_KEYS},
            version("nnunetv2"),
        ]
    )


def unprepared_cases(
    preprocessed: Path, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> list[str]:
    """Return the cases of the plans' split that are not preprocessed as these plans ask; no image is opened.

    Args:
        preprocessed: the dataset's folder in `nnUNet_preprocessed`.
        plans: content of the plans file.
        configuration: name of a configuration in the plans.
        dataset_json: content of dataset.json.
    """
    folders = CaseFolders.of(preprocessed, plans["configurations"][configuration]["data_identifier"])
    done = read_json_if_valid(folders.manifest) or {}
    settings = _settings(plans, configuration, dataset_json)
    split, partial = plans["lgssl"]["split"], plans["lgssl"].get("partial_labels", {})
    wanted = dict.fromkeys(split["unlabeled"], False) | dict.fromkeys(split["labeled"], True)
    sizes = {is_labeled: folders.sizes(is_labeled) for is_labeled in (True, False)}
    treatment = {is_drawn: _treatment(plans, configuration, is_drawn) for is_drawn in (True, False)}
    return sorted(
        name
        for name, is_labeled in wanted.items()
        if (done.get(name) or {}).get("settings") != settings
        or done[name]["labeled"] != is_labeled
        or done[name].get("annotated") != partial.get(name)
        or not treatment[not is_labeled or name in partial].items() <= done[name].items()
        or not _are_as_noted(name, is_labeled, sizes[is_labeled], done[name].get("files", {}))
    )


def _are_as_noted(name: str, is_labeled: bool, sizes: Mapping[str, int], records: Mapping[str, Any]) -> bool:
    """Whether all files of a case are there, in the sizes noted when they were written (if they were noted)."""
    files = [f"{name}{suffix}" for suffix in (LABELED_SUFFIXES if is_labeled else UNLABELED_SUFFIXES)]
    return all(file in sizes and sizes[file] == records.get(file, {"size": sizes[file]})["size"] for file in files)


def _finished_cases(folders: CaseFolders, dataset: RawDataset, keys: Mapping[str, dict]) -> dict[str, dict]:
    """Return the manifest's entries of the cases whose sources, settings and preprocessed files have not changed."""
    manifest = read_json_if_valid(folders.manifest)
    if not isinstance(manifest, dict):
        return {}
    finished = {}
    for name, case in dataset.cases.items():
        entry = manifest.get(name)
        if sources_of(entry) != keys[name]:
            continue
        records = entry.get("files", {})  # manifests of 0.1.0 have none
        files = folders.files(name, case.label is not None)
        changed = [file.name for file in files if not is_unchanged(file, records.get(file.name))]
        if changed:
            logger.warning("%s: %s is missing or not as written; preprocessed again.", name, changed[0])
        else:
            finished[name] = entry
    return finished


def _prepare_folders(folders: CaseFolders, dataset: RawDataset) -> None:
    """Create the folders and remove the files of cases that are no longer labelled, or unlabelled, or there at all."""
    shutil.rmtree(folders.unfinished, ignore_errors=True)
    folders.unfinished.mkdir(parents=True)
    for folder, cases, is_labeled in (
        (folders.labeled, dataset.labeled, True),
        (folders.unlabeled, dataset.unlabeled, False),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        expected = {file for name in cases for file in folders.files(name, is_labeled)}
        for file in folder.iterdir():
            if file.is_file() and file not in expected:
                file.unlink()


def _note_finished(done: Mapping[str, dict], manifest: Path, has_failures: bool) -> None:
    """Write the manifest; where the disk has no room for it, the failed cases are still to be named."""
    try:
        write_json(dict(sorted(done.items())), manifest)
    except OSError as error:
        if not has_failures:
            raise
        logger.warning("%s cannot be written (%s): the finished cases will be made again.", manifest, error)


def _raise_failures(failures: Mapping[str, CaseFailure], dataset_name: str) -> None:
    for name in sorted(failures):
        logger.debug("Preprocessing of %s failed:\n%s", name, failures[name].details)
    remedy = "repair the case and run the command again (the others are kept)"
    raise_if_any(
        [Problem(name, f"preprocessing failed ({failures[name].reason})", remedy) for name in sorted(failures)],
        dataset_name,
    )
