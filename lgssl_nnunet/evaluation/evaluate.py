"""Compare a folder of segmentations with their references: the function behind `lgssl_evaluate`."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from lgssl_nnunet.data.partial_labels import class_values
from lgssl_nnunet.errors import DatasetError, PlansError, UsageError, install_extra
from lgssl_nnunet.evaluation.case import CaseMeasurement, CaseSettings, LabelOrRegion, measure_case
from lgssl_nnunet.evaluation.evaluation_files import write_results
from lgssl_nnunet.evaluation.lesions import lesion_class_names
from lgssl_nnunet.evaluation.part import (
    DESCRIPTION,
    cases_of_group,
    classes_of_part,
    name_for_group,
    partial_references,
)
from lgssl_nnunet.evaluation.surfaces import available_columns, missing_columns
from lgssl_nnunet.files import parse_json
from lgssl_nnunet.parallel import CaseFailure, run_cases
from lgssl_nnunet.plans.cases import find_reader
from lgssl_nnunet.plans.partial_labels import annotation_problems
from lgssl_nnunet.problems import raise_if_any

logger = logging.getLogger(__name__)

DEFAULT_WORKERS = min(8, os.cpu_count() or 1)
DEFAULT_TOLERANCE = 1.0


def evaluate(
    reference: str | Path,
    prediction: str | Path,
    *,
    dataset_json: str | Path | Mapping[str, Any] | None = None,
    plans: str | Path | Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    lesion_classes: Sequence[str] | None = None,
    group: str | None = None,
    surface_metrics: bool = True,
    num_processes: int = DEFAULT_WORKERS,
    chill: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure overlap, surface distances and lesions per class and case; write nnU-Net's summary.json and our tables.

    What the columns mean is said in `ClassResult`. The surface columns need the extra `evaluation`; without it they are
    left out. Of predictions that hold some classes only (`lgssl_predict --classes`), these are measured. With worker
    processes a script needs the usual `if __name__ == "__main__":` around its code.

    Args:
        reference: folder with the reference segmentations.
        prediction: folder with the predicted segmentations, under the same file names.
        dataset_json: the dataset's description; by default the one that prediction left in `prediction`.
        plans: the plans; by default those in `prediction`, and without any nnU-Net's usual reading of the labels.
        output: the summary, ending in .json; by default `prediction`/summary.json (of a group summary_GROUP.json). The
            table per case is written beside it with `_per_case.csv` instead of `.json`, the means per class with
            `_per_class.json`.
        tolerance: tolerance of the surface Dice in mm.
        lesion_classes: names of the classes whose lesions are counted; None takes those whose names say so (tumour,
            lesion, metastasis, cancer, carcinoma, nodule, cyst ...).
        group: evaluate the cases of one of the `groups` in dataset.json, by the classes that it annotates; None for
            all cases.
        surface_metrics: measure surface distances, which takes most of the time.
        num_processes: worker processes; 0 does the work in this process.
        chill: evaluate the cases that are there instead of refusing when predictions are missing.
        progress: show a bar over the cases (only on a terminal).

    Returns:
        `summary` (what is in summary.json), `cases` (`ClassResult` of each class and case), `classes` (`ClassMean` of
        each class), `means` (each metric's mean over the classes), `dice` and `jaccard` (two of them), `tolerance`,
        `summary_file`, `cases_file` and `classes_file`.

    Raises:
        DatasetError: missing folders, predictions or references (all named), segmentations that are damaged or do
            not match, or a dataset.json that says something impossible of what is annotated.
        PlansError: dataset.json or plans.json is missing or unreadable.
        UsageError: a tolerance that is no length, lesion classes or a group that dataset.json does not have, or
            predictions without any class that the references annotate.
    """
    reference, prediction = Path(reference).expanduser(), Path(prediction).expanduser()
    summary_file = Path(output).expanduser() if output else prediction / name_for_group("summary.json", group)
    if summary_file.suffix != ".json":
        raise DatasetError(f"-o {summary_file}: the summary is JSON; give a file that ends in .json.")
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"--tolerance must be a length in mm, 0 or more, not {tolerance}.")
    _require_folders(reference, prediction)
    dataset = _read_description(dataset_json, prediction, "dataset.json", "-djfile")
    labels = _label_manager(plans, dataset, prediction)
    # The folder need not hold every case that dataset.json names.
    raise_if_any(annotation_problems(dataset), DESCRIPTION)
    belongs = cases_of_group(dataset, group)
    names = classes_of_part(_class_names(labels), dataset, group, prediction)
    lesions = _lesion_classes(lesion_classes, list(names.values()))
    ending = dataset["file_ending"]
    _require_cases_of_group(reference, prediction, ending, belongs, group)
    files = _matching_files(reference, prediction, ending, chill, belongs)
    columns = available_columns() if surface_metrics else ()
    settings = CaseSettings(find_reader(dataset, reference / files[0]), labels, names, columns, tolerance, lesions)
    if surface_metrics:
        _tell_missing_columns()
    partial = partial_references(dataset, [name.removesuffix(ending) for name in files], names, prediction)
    tasks = {
        name: (case := name.removesuffix(ending), reference / name, prediction / name, settings, partial.get(case))
        for name in files
    }
    bar = progress and sys.stderr.isatty()
    measured = dict(run_cases(measure_case, tasks, num_processes=num_processes, description="Evaluating", progress=bar))
    _raise_failures({name: result for name, result in measured.items() if isinstance(result, CaseFailure)})
    _tell_geometry({name: measured[name] for name in files}, bool(columns))
    return write_results([measured[name] for name in files], settings, summary_file)


def _lesion_classes(asked: Sequence[str] | None, names: Sequence[str]) -> frozenset[str]:
    if asked is None:
        return frozenset(lesion_class_names(names))
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise UsageError(
            f"--lesion_classes {' '.join(unknown)}: dataset.json has the classes {', '.join(names)}; choose among them."
        )
    return frozenset(asked)


def _tell_missing_columns() -> None:
    missing = missing_columns()
    if missing:
        logger.warning("Left out: %s. They need %s.", ", ".join(missing), install_extra("evaluation"))


def _tell_geometry(measured: Mapping[str, CaseMeasurement], surfaces: bool) -> None:
    """Say what a reader of the distances has to know: two different spacings, and surfaces along ignored voxels."""
    differ = [name for name, case in measured.items() if not np.allclose(*case.spacings, rtol=1e-3)]
    if differ and surfaces:
        logger.warning(
            "The voxel sizes of reference and prediction differ in %d case(s): %s. Distances are in the reference's.",
            len(differ),
            ", ".join(differ),
        )
    ignoring = sum(case.ignored > 0 for case in measured.values())
    if ignoring:
        logger.info(
            "%d reference(s) hold ignored voxels, which are cut out of both masks: the cuts count as surface, and a "
            "lesion that they divide as several.",
            ignoring,
        )


def _require_folders(reference: Path, prediction: Path) -> None:
    for folder, what in ((reference, "references"), (prediction, "predictions")):
        if not folder.is_dir():
            problem = "is a file" if folder.is_file() else "does not exist"
            raise DatasetError(f"{folder} {problem}; give the folder of the {what}.")


def _require_cases_of_group(
    reference: Path, prediction: Path, file_ending: str, belongs: Callable[[str], bool], group: str | None
) -> None:
    for folder, what in ((reference, "reference"), (prediction, "prediction")):
        names = _segmentations(folder, file_ending)
        if names and not any(belongs(name.removesuffix(file_ending)) for name in names):
            raise DatasetError(f"{folder} holds no {what} of a case of group {group}; choose a group that has some.")


def _matching_files(
    reference: Path, prediction: Path, file_ending: str, chill: bool, belongs: Callable[[str], bool]
) -> list[str]:
    """Return the file names to compare of the cases that belong to the evaluation, in nnU-Net's order.

    Raises:
        DatasetError: predictions are missing, all named (with `chill` only if all are), or nothing has a reference.
    """
    references, predictions = (
        [name for name in _segmentations(folder, file_ending) if belongs(name.removesuffix(file_ending))]
        for folder in (reference, prediction)
    )
    missing = [name for name in references if name not in predictions]
    surplus = [name for name in predictions if name not in references]
    both = [name for name in predictions if name in references]
    if not both:
        raise DatasetError(_nothing_to_compare({reference: references, prediction: predictions}, file_ending))
    if missing and not chill:
        raise DatasetError(
            f"{prediction} lacks {len(missing)} of {len(references)} cases: {', '.join(missing)}; predict them, or add "
            "--chill to evaluate the others."
        )
    if missing:
        logger.warning("No prediction for %d of %d cases: %s", len(missing), len(references), ", ".join(missing))
    if surplus:
        logger.warning("No reference for %d predictions, left out: %s", len(surplus), ", ".join(surplus))
    return both


def _nothing_to_compare(names: Mapping[Path, Sequence[str]], file_ending: str) -> str:
    """Return the message on two folders that share no file name, with an example from each."""
    found = [
        f"{folder} holds {len(files)} file(s) that end in {file_ending}" + (f", such as {files[0]}" if files else "")
        for folder, files in names.items()
    ]
    if all(names.values()):
        remedy = "give each prediction the name of its reference"
    else:
        remedy = "give the folders of the segmentations, or with -djfile the dataset.json that has their file_ending"
    return f"There is nothing to compare, because no name is in both folders: {'; '.join(found)}; {remedy}."


def _segmentations(folder: Path, file_ending: str) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file() and file.name.endswith(file_ending))


def _raise_failures(failures: Mapping[str, CaseFailure]) -> None:
    if failures:
        listing = "\n".join(f"  {failure.reason}" for failure in failures.values())
        raise DatasetError(f"{len(failures)} case(s) cannot be compared:\n{listing}")


def _label_manager(
    plans: str | Path | Mapping[str, Any] | None, dataset: Mapping[str, Any], prediction: Path
) -> LabelManager:
    """Return nnU-Net's reading of the labels, which the plans may change.

    Raises:
        PlansError: dataset.json has no labels and file ending in nnU-Net's form.
    """
    labels, ending = dataset.get("labels"), dataset.get("file_ending")
    if not (isinstance(labels, Mapping) and isinstance(ending, str) and ending):
        raise PlansError("dataset.json needs the entries labels and file_ending; take the one of the raw dataset.")
    planned = None
    if plans is not None or (prediction / "plans.json").is_file():
        planned = PlansManager(_read_description(plans, prediction, "plans.json", "-pfile"))
    try:
        if planned is None:
            return LabelManager(labels, dataset.get("regions_class_order"))
        return planned.get_label_manager(dataset)
    except (AssertionError, AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise PlansError(
            f"nnU-Net can make nothing of the labels in dataset.json ({reason}); take the one of the raw dataset."
        ) from error


def _class_names(labels: LabelManager) -> dict[LabelOrRegion, str]:
    """Return the foreground classes as nnU-Net evaluates them, with their names in dataset.json."""
    classes = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    names = {class_values(value): name for name, value in labels.label_dict.items() if name != "ignore"}
    return {
        (tuple(key) if isinstance(key, (tuple, list)) else int(key)): names.get(class_values(key), str(key))
        for key in classes
    }


def _read_description(
    source: str | Path | Mapping[str, Any] | None, folder: Path, name: str, flag: str
) -> dict[str, Any]:
    """Return a description given as such, as a file, or lying in `folder`."""
    if isinstance(source, Mapping):
        return dict(source)
    file = Path(source).expanduser() if source else folder / name
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlansError(f"{file} is missing; name it with {flag}.") from error
    except ValueError as error:
        raise PlansError(f"{file} is not readable as JSON ({error}); name another with {flag}.") from error
    if not isinstance(content, dict):
        raise PlansError(f"{file} holds no JSON object; name another with {flag}.")
    return content
