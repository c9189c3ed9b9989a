"""From whole labels to two orthogonal slices per labelled case: the function behind `lgssl_sparse_annotation`.

Of a label only these two slices are used, by the propagation and by a training on the plans that are written here. The
intensity statistics, which normalise CT, stay those of the base plans, from whole labels.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from lgssl_nnunet.data.sparse import annotation_file, stored_locations, stored_origin, write_annotation
from lgssl_nnunet.data.unlabeled import mark_outside
from lgssl_nnunet.errors import MissingDependencyError, PlansError, UsageError
from lgssl_nnunet.files import content_hash, copy_file, environment, read_json, read_json_if_valid, write_json
from lgssl_nnunet.locks import hold_lock, lock_beside
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.paths import use_data_folders
from lgssl_nnunet.plans.orthogonal_slices import (
    annotated_slices,
    annotated_volume,
    class_locations,
    middle_slices,
    read_slices,
)
from lgssl_nnunet.plans.preprocessing import CaseFolders, sources_of, unprepared_cases
from lgssl_nnunet.plans.propagation import REGISTRATIONS, one_thread
from lgssl_nnunet.plans.stored import load_plans, preprocessed_folder
from lgssl_nnunet.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)

VERSION = 1
"""Counts up whenever the same slices would give another annotation."""


def sparse_annotation(
    dataset: int | str,
    *,
    plans: str | None = None,
    configurations: Sequence[str] = ("3d_fullres",),
    slices: Path | str | None = None,
    registration: str = "simpleitk",
    num_processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Reduce the labelled cases of plans to two orthogonal slices each and propagate these; what is done is kept.

    Args:
        dataset: dataset id or name, planned and preprocessed.
        plans: plans name; None takes the newest plans of the dataset.
        configurations: 3D configurations to annotate; the derived plans have no other.
        slices: JSON file such as `{"CASE": {"z": 40, "y": 112}}` with every labelled case: axis of the image file to
            slice, counted from 0; the one named first belongs to the network that predicts. None takes the middle
            slices along the first two axes.
        registration: a name of `lgssl_nnunet.plans.propagation.REGISTRATIONS`.
        num_processes: worker processes; 0 for none; None: at most 8, one per core.
        progress: show a progress bar.

    Returns:
        The derived plans file, `<plans>_orthogonal.json`.

    Raises:
        UsageError: an argument names something unknown.
        PlansError: the plans cannot be annotated so: 2D, regions, an ignore label, or cases not preprocessed.
        DatasetError: a case failed, or the file of slices does not fit; everything wrong is listed.
        MissingDependencyError: the registration needs a package that is not installed.
        FolderBusyError: another process is planning or annotating the dataset.
    """
    use_data_folders()
    folder = preprocessed_folder(dataset)
    base = load_plans(folder, plans)
    dataset_json = read_json(folder / "dataset.json")
    _check_registration(registration)
    _check_labels(base, dataset_json)
    for configuration in configurations:
        _check_configuration(folder, base, configuration, dataset_json)
    asked = (_folders(folder, base, configurations[0]).labeled, base["lgssl"]["split"]["labeled"])
    transpose = base["transpose_forward"]
    chosen = middle_slices(*asked, transpose) if slices is None else annotated_slices(Path(slices), *asked, transpose)
    derived = _derive(base, configurations, registration, chosen)
    num_processes = min(8, os.cpu_count() or 1) if num_processes is None else num_processes
    name = derived["plans_name"]
    old, new = (folder / f"dataset_fingerprint_{plans_name}.json" for plans_name in (base["plans_name"], name))
    with hold_lock(lock_beside(folder, "planning"), folder):
        for configuration in configurations:
            _annotate(folder, derived, configuration, dataset_json, num_processes, progress)
        _warn_of_missing_classes(folder, derived, configurations[0], dataset_json)
        copy_file(old, new)
        write_json(derived, folder / f"{name}.json")
    return folder / f"{name}.json"


def unannotated_cases(preprocessed: Path, plans: Mapping[str, Any], configuration: str) -> list[str]:
    """Return the labelled cases whose annotation is missing or out of date; none if the plans ask for whole labels.

    Args:
        preprocessed: the dataset's folder in `nnUNet_preprocessed`.
        plans: content of the plans file.
        configuration: name of a configuration in the plans.
    """
    if "sparse_annotation" not in plans["lgssl"]:
        return []
    labeled = _folders(preprocessed, plans, configuration).labeled
    origins = _origins(preprocessed, plans, configuration)
    return [case for case, origin in origins.items() if stored_origin(annotation_file(labeled, case)) != origin]


def annotate_case(
    case: str, preprocessed: Path, plans: dict[str, Any], configuration: str, file_ending: str, origin: str
) -> None:
    """Propagate the two slices of one case and write its file."""
    plans_manager = PlansManager(plans)
    planned = plans_manager.get_configuration(configuration)
    labeled = _folders(preprocessed, plans, configuration).labeled
    settings = plans["lgssl"]["sparse_annotation"]
    image = blosc2.open(urlpath=str(labeled / f"{case}.b2nd"), mode="r")[:]
    properties = load_pickle(str(labeled / f"{case}.pkl"))
    label_file = preprocessed / "gt_segmentations" / f"{case}{file_ending}"
    shape = image.shape[1:]
    # ITK adds up in another order on several threads; one makes files reproducible, as in preprocessing.
    with environment({"BLOSC_NTHREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}), one_thread():
        true_slices = read_slices(label_file, settings["slices"][case], properties, plans_manager, planned, shape)
        register = REGISTRATIONS[settings["registration"]]
        annotation = annotated_volume(image[0], true_slices, planned.spacing, register)
        mark_outside(annotation[0], image[np.asarray(planned.use_mask_for_norm, dtype=bool)])
        locations = class_locations(true_slices, shape)
        write_annotation(annotation_file(labeled, case), annotation, origin, locations, tuple(planned.patch_size))


def _check_registration(name: str) -> None:
    if name not in REGISTRATIONS:
        raise UsageError(f"There is no registration {name!r}: choose one of {', '.join(REGISTRATIONS)}.")
    if name == "ants" and importlib.util.find_spec("ants") is None:
        raise MissingDependencyError(
            "Registration with ANTs needs the package antspyx: run pip install -e '.[ants]' in the checkout, without "
            "constraints.txt, or leave out --registration."
        )


def _check_labels(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> None:
    name, label_manager = plans["plans_name"], PlansManager(plans).get_label_manager(dataset_json)
    if plans["lgssl"].keys() & {"training", "sparse_annotation"}:
        raise PlansError(f"{name} are derived from other plans: name those that lgssl_plan_and_preprocess wrote.")
    if "partial_labels" in plans["lgssl"]:
        raise PlansError(
            f"Some labelled cases of {name} annotate only some of the classes, so their slices would say where others "
            "are not: plan with --labeled_list and cases that annotate every class."
        )
    if label_manager.has_ignore_label:
        raise PlansError(
            f"The labels of {name} have an ignore label, so they are sparse in another way already: train on them as "
            "they are, the voxels to be ignored are left out."
        )
    if label_manager.has_regions:
        raise PlansError(
            f"The labels of {name} are overlapping regions, which cannot be propagated from slices: define classes "
            "that exclude each other."
        )


def _check_configuration(
    folder: Path, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> None:
    name = plans["plans_name"]
    if configuration not in plans["configurations"]:
        raise PlansError(
            f"{name} have no configuration {configuration}; they have {', '.join(plans['configurations'])}."
        )
    planned = PlansManager(plans).get_configuration(configuration)
    if len(planned.patch_size) != 3 or planned.previous_stage_name is not None:
        raise PlansError(
            f"{configuration} has no volumes with orthogonal slices: choose a 3D configuration such as 3d_fullres."
        )
    missing = unprepared_cases(folder, plans, configuration, dataset_json)
    if missing:
        raise PlansError(
            f"{len(missing)} cases are not preprocessed as {name} ask (among them {missing[0]}): plan the dataset "
            f"again with the same options and -c {configuration}."
        )


def _derive(
    plans: dict[str, Any], configurations: Sequence[str], registration: str, slices: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    settings = {
        "version": VERSION,
        "planned_as": plans["plans_name"],
        "registration": registration,
        "slices": slices,
    }
    return {
        **plans,
        "plans_name": f"{plans['plans_name']}_orthogonal",
        "configurations": {name: plans["configurations"][name] for name in configurations},
        "lgssl": {**plans["lgssl"], "sparse_annotation": settings},
    }


def _annotate(
    folder: Path,
    plans: dict[str, Any],
    configuration: str,
    dataset_json: Mapping[str, Any],
    num_processes: int,
    progress: bool,
) -> None:
    origins = _origins(folder, plans, configuration)
    todo = unannotated_cases(folder, plans, configuration)
    logger.info("%s: %d cases to annotate, %d unchanged.", configuration, len(todo), len(origins) - len(todo))
    ending = dataset_json["file_ending"]
    problems = []
    for case, result in run_cases(
        annotate_case,
        {case: (case, folder, plans, configuration, ending, origins[case]) for case in todo},
        num_processes=num_processes,
        description=f"Propagating {configuration}",
        progress=progress,
    ):
        if isinstance(result, CaseFailure):
            logger.debug("Propagation of %s failed:\n%s", case, result.details)
            remedy = "repair the case and run the command again (the others are kept)"
            problems.append(Problem(case, f"propagation failed ({result.reason})", remedy))
    raise_if_any(sorted(problems, key=lambda problem: problem.file), folder.name)


def _warn_of_missing_classes(
    folder: Path, plans: Mapping[str, Any], configuration: str, dataset_json: Mapping[str, Any]
) -> None:
    """Tell which classes lie on no slice of a case, which then is a label without them."""
    labeled = _folders(folder, plans, configuration).labeled
    cases = plans["lgssl"]["sparse_annotation"]["slices"]
    seen = {case: set(stored_locations(annotation_file(labeled, case))) for case in cases}
    for name, value in dataset_json["labels"].items():
        without = [case for case in cases if value not in seen[case]]
        if value != 0 and without:
            logger.warning(
                "%s lies on neither slice of %d of %d cases (%s): choose slices that show it with --slices.",
                name,
                len(without),
                len(cases),
                ", ".join(without[:5]) + (" ..." if len(without) > 5 else ""),
            )


def _origins(preprocessed: Path, plans: Mapping[str, Any], configuration: str) -> dict[str, str]:
    """Return by case a hash of what its annotation depends on; the manifest tells files and settings of the case."""
    manifest = read_json_if_valid(_folders(preprocessed, plans, configuration).manifest) or {}
    settings = plans["lgssl"]["sparse_annotation"]
    return {
        case: content_hash(
            [sources_of(manifest.get(case)), list(slices.items()), settings["registration"], settings["version"]]
        )
        for case, slices in settings["slices"].items()
    }


def _folders(preprocessed: Path, plans: Mapping[str, Any], configuration: str) -> CaseFolders:
    return CaseFolders.of(preprocessed, plans["configurations"][configuration]["data_identifier"])
