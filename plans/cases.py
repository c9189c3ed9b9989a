"""Which case of a raw dataset is what: labelled, unlabelled or test."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.paths import data_folders, is_dataset, is_plain_name
from lgssl_nnunet.plans.dataset_json import load_dataset_json
from lgssl_nnunet.plans.partial_labels import annotation_problems
from lgssl_nnunet.problems import Problem, first_of

if TYPE_CHECKING:
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

logger = logging.getLogger(__name__)

_CHANNEL_FILE = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Case:
    """One case of a raw dataset.

    Attributes:
        identifier: name of the case, without channel and file ending.
        images: one file per channel (or one file that holds all channels).
        label: segmentation file; None for an unlabelled case, so that nothing can open it.
    """

    identifier: str
    images: tuple[Path, ...]
    label: Path | None = None

    def without_label(self) -> Case:
        """Return the same case as an unlabelled one."""
        return replace(self, label=None)


@dataclass(frozen=True)
class RawDataset:
    """A dataset in `nnUNet_raw`.

    Labelled is a case in imagesTr with a file in labelsTr; unlabelled is a case in imagesUn, or one in imagesTr
    without a label file; imagesTs is listed and never used.

    Attributes:
        folder: the dataset's folder.
        name: `DatasetXXX_Name`.
        dataset_json: content of dataset.json as it stands.
        labeled: labelled cases by identifier, sorted.
        unlabeled: unlabelled cases by identifier, sorted.
        test: identifiers of the cases in imagesTs, sorted.
        problems: what is wrong with the files' names and number and with what dataset.json says of cases; nothing has
            been opened yet.
    """

    folder: Path
    name: str
    dataset_json: dict[str, Any]
    labeled: Mapping[str, Case]
    unlabeled: Mapping[str, Case]
    test: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    @property
    def file_ending(self) -> str:
        """File ending of images and labels, such as `.nii.gz`."""
        return self.dataset_json["file_ending"]

    @property
    def num_channels(self) -> int:
        """Number of image channels that dataset.json declares."""
        return len(self.dataset_json["channel_names"])

    @property
    def cases(self) -> dict[str, Case]:
        """All training cases, labelled and unlabelled, in the order of their identifiers."""
        return dict(sorted({**self.labeled, **self.unlabeled}.items()))

    def with_labeled(self, identifiers: Iterable[str]) -> RawDataset:
        """Return the dataset in which only the given cases are labelled; the others lose their label file."""
        kept = set(identifiers)
        left_out = {name: case.without_label() for name, case in self.labeled.items() if name not in kept}
        return replace(
            self,
            labeled={name: case for name, case in self.labeled.items() if name in kept},
            unlabeled=dict(sorted({**self.unlabeled, **left_out}.items())),
        )


def load_raw_dataset(dataset: int | str) -> RawDataset:
    """Find a dataset in `nnUNet_raw` and sort its cases.

    Args:
        dataset: id (501 or "501") or folder name ("Dataset501_Name").

    Raises:
        UsageError: no dataset, or more than one, has this id or name.
        DatasetError: dataset.json is missing or incomplete, or there is no image or no labelled case.
    """
    folder = find_raw_folder(dataset)
    dataset_json = load_dataset_json(folder)
    if "dataset" in dataset_json:
        cases, problems = _listed_cases(folder, dataset_json)
    else:
        cases, problems = _cases_in_images_tr(folder, dataset_json)
    extra, extra_problems = _cases_in(folder / "imagesUn", dataset_json)
    for name in sorted(set(cases) & set(extra)):
        problem = Problem(f"{folder.name}/{name}", "is in imagesTr and in imagesUn", "remove it from one of the two")
        extra_problems.append(problem)
    everything = dict(sorted({**extra, **cases}.items()))
    _require_cases(folder, everything, dataset_json["file_ending"])
    problems += extra_problems + missing_channels(everything, dataset_json)
    test = held_out_cases(folder, dataset_json)
    problems += annotation_problems(dataset_json, (*everything, *test))
    _warn_about_num_training(dataset_json, cases, everything)
    _warn_about_labels_without_image(folder, everything, dataset_json)
    return RawDataset(
        folder=folder,
        name=folder.name,
        dataset_json=dataset_json,
        labeled={name: case for name, case in everything.items() if case.label is not None},
        unlabeled={name: case for name, case in everything.items() if case.label is None},
        test=tuple(test),
        problems=tuple(problems),
    )


def find_raw_folder(dataset: int | str) -> Path:
    """Return the folder in `nnUNet_raw` that has this id or name.

    Raises:
        UsageError: none or several have it; the message lists what there is.
    """
    raw = data_folders()["nnUNet_raw"].path
    folders = sorted(path for path in raw.glob("Dataset*") if path.is_dir()) if raw.is_dir() else []
    wanted = str(dataset)
    found = [path for path in folders if is_dataset(path.name, wanted)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"Dataset id {wanted} belongs to several folders in {raw}: {names}; give the folder's name.")
    there = ", ".join(path.name for path in folders) or "no dataset"
    raise UsageError(f"No dataset {wanted} in {raw}, which holds: {there}; check -d and the variable nnUNet_raw.")


def held_out_cases(folder: Path, dataset_json: Mapping[str, Any]) -> dict[str, Case]:
    """Return the cases in imagesTs by identifier, sorted and without labels; nothing may be learnt from them."""
    return dict(sorted(_cases_in(folder / "imagesTs", dataset_json)[0].items()))


def find_reader(dataset_json: dict[str, Any], example_image: Path) -> type[BaseReaderWriter]:
    """Return nnU-Net's reader class for a dataset, chosen as nnU-Net's planner chooses it.

    Raises:
        DatasetError: nnU-Net has no reader for the file ending, or none of the name that dataset.json gives.
    """
    from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

    named = dataset_json.get("overwrite_image_reader_writer", "None")
    found = _choice_of_nnunet(dataset_json, example_image) if isinstance(named, str) else None
    if isinstance(found, type) and issubclass(found, BaseReaderWriter):  # any name in nnU-Net's modules is found
        return found
    if named != "None":
        raise DatasetError(
            f"dataset.json: overwrite_image_reader_writer is {str(named)[:100]!r}, which is no reader of nnU-Net; "
            "correct it or leave it out."
        )
    raise DatasetError(
        f"dataset.json: nnU-Net has no reader for files ending in {dataset_json['file_ending']!r}; "
        "convert the images, for example to .nii.gz, and correct file_ending."
    )


def _choice_of_nnunet(dataset_json: dict[str, Any], example_image: Path) -> Any:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    noise = io.StringIO()
    for example in (str(example_image), None):  # a damaged example image is the integrity check's business, not ours
        try:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                return determine_reader_writer_from_dataset_json(dataset_json, example, verbose=False)
        except RuntimeError:
            continue
    return None


def _require_cases(folder: Path, cases: Mapping[str, Case], ending: str) -> None:
    if not cases:
        raise DatasetError(_no_image(folder, ending))
    if all(case.label is None for case in cases.values()):
        raise DatasetError(f"{folder}: no case has a label file in labelsTr; at least one labelled case is needed.")


def _no_image(folder: Path, ending: str) -> str:
    """Return a sentence for a dataset without images, which names the endings that are there instead."""
    images = folder / "imagesTr"
    names = os.listdir(images) if images.is_dir() else []
    others = sorted({"".join(Path(name).suffixes[-2:]) for name in names if not name.startswith(".")} - {""})
    found = (
        f"it holds files ending in {', '.join(others[:3])}: correct file_ending, or" if others else "put images there,"
    )
    return (
        f"{images}: holds no image ending in {ending}, which is dataset.json's file_ending; {found} name images "
        f"CASE_0000{ending} and so on, one file per channel."
    )


def _warn_about_num_training(
    dataset_json: Mapping[str, Any], in_images_tr: Mapping[str, Case], everything: Mapping[str, Case]
) -> None:
    declared = dataset_json.get("numTraining")
    num_labeled = sum(case.label is not None for case in everything.values())
    if declared not in (None, num_labeled, len(in_images_tr), len(everything)):
        logger.warning(
            "dataset.json says numTraining %s; imagesTr holds %d cases, %d of them labelled. The files count.",
            declared,
            len(in_images_tr),
            num_labeled,
        )


def _warn_about_labels_without_image(folder: Path, cases: Mapping[str, Case], dataset_json: Mapping[str, Any]) -> None:
    """Say which label files belong to no image: mostly a misspelt name, and the image then counts as unlabelled."""
    ending = dataset_json["file_ending"]
    if "dataset" in dataset_json or not (folder / "labelsTr").is_dir():
        return
    names = {name.removesuffix(ending) for name in os.listdir(folder / "labelsTr") if name.endswith(ending)}
    alone = sorted(names.difference(cases))
    if alone:
        logger.warning(
            "labelsTr holds labels without an image in imagesTr, which are not used: %s.", first_of(alone, 5)
        )


def _cases_in_images_tr(folder: Path, dataset_json: Mapping[str, Any]) -> tuple[dict[str, Case], list[Problem]]:
    cases, problems = _cases_in(folder / "imagesTr", dataset_json)
    labels = {name: folder / "labelsTr" / f"{name}{dataset_json['file_ending']}" for name in cases}
    found = {name: replace(case, label=labels[name]) if labels[name].exists() else case for name, case in cases.items()}
    return found, problems


def _cases_in(folder: Path, dataset_json: Mapping[str, Any]) -> tuple[dict[str, Case], list[Problem]]:
    """Group the image files of one folder by case; a folder that does not exist holds no case."""
    ending = dataset_json["file_ending"]
    files: dict[str, list[Path]] = {}
    problems = []
    for name in sorted(os.listdir(folder)) if folder.is_dir() else []:
        if not name.endswith(ending):
            continue
        match = _CHANNEL_FILE.fullmatch(name.removesuffix(ending))
        if match:
            files.setdefault(match["case"], []).append(folder / name)
        else:
            shown = f"{folder.name}/{name}"
            problems.append(Problem(shown, "has no channel number", f"name it like CASE_0000{ending}"))
    return {name: Case(name, tuple(paths)) for name, paths in files.items()}, problems


def _listed_cases(folder: Path, dataset_json: Mapping[str, Any]) -> tuple[dict[str, Case], list[Problem]]:
    """Read the cases that dataset.json lists itself; paths are relative to the folder, variables are expanded."""
    cases, problems = {}, []
    for name, entry in sorted(dataset_json["dataset"].items()):
        if not is_plain_name(name) or not _is_listing(entry):
            problem = Problem(f"dataset.json, case {name}", "has no list of images", "list one file per channel")
            problems.append(problem)
            continue
        images = tuple(_listed_path(folder, path) for path in entry["images"])
        for image in images:
            if not os.path.exists(image):  # False where Path.exists raises: for a path that is too long
                problems.append(Problem(str(image), "is listed in dataset.json but does not exist", "correct the path"))
        label = _listed_path(folder, entry["label"]) if entry.get("label") else None
        cases[name] = Case(name, images, label if label is not None and os.path.exists(label) else None)
    return cases, problems


def _is_listing(entry: Any) -> bool:
    """Whether an entry of dataset.json lists image files, and a label file if any."""
    if not (isinstance(entry, dict) and isinstance(entry.get("images"), list) and entry["images"]):
        return False
    return all(isinstance(path, str) for path in (*entry["images"], entry.get("label") or ""))


def _listed_path(folder: Path, path: str) -> Path:
    return Path(os.path.abspath(folder / os.path.expandvars(path)))


def missing_channels(cases: Mapping[str, Case], dataset_json: dict[str, Any]) -> list[Problem]:
    """Return which channels of cases are missing, or are not known to dataset.json.

    Args:
        cases: training cases, or those of `held_out_cases`.
        dataset_json: content of dataset.json.
    """
    expected = _files_per_case(cases, dataset_json) if cases else 0
    ending = dataset_json["file_ending"]
    problems = []
    for name, case in cases.items():
        if "dataset" in dataset_json and name in dataset_json["dataset"]:
            if len(case.images) != expected:
                found = f"lists {len(case.images)} images instead of {expected}"
                problems.append(Problem(f"dataset.json, case {name}", found, "list one file per channel"))
            continue
        present = {path.name for path in case.images}
        folder = case.images[0].parent.name
        wanted = [f"{name}_{channel:04d}{ending}" for channel in range(expected)]
        for file in wanted:
            if file not in present:
                problems.append(Problem(f"{folder}/{file}", "is missing", "add this channel or remove the case"))
        for file in sorted(present.difference(wanted)):
            surplus = f"is a channel that dataset.json does not know (it names {len(dataset_json['channel_names'])})"
            problems.append(Problem(f"{folder}/{file}", surplus, "remove it or add it to channel_names"))
    return problems


def _files_per_case(cases: Mapping[str, Case], dataset_json: dict[str, Any]) -> int:
    """Return the number of image files per case: one per channel, or one if a single file holds all channels."""
    num_channels = len(dataset_json["channel_names"])
    if num_channels == 1 or any(len(case.images) > 1 for case in cases.values()):
        return num_channels
    example = next(iter(cases.values())).images[0]
    try:
        images, _ = find_reader(dataset_json, example)().read_images((str(example),))
    except Exception:  # an unreadable file tells nothing; the integrity check will name it
        return num_channels
    return 1 if len(images) == num_channels else num_channels
