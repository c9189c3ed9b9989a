"""From the cases found in a download to a raw nnU-Net dataset: reading, checking, writing, resuming, recording."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import SimpleITK as sitk

import lgssl_nnunet
from lgssl_nnunet.dataset_conversion.case_records import CaseRecords, refuse_taken_number, require_space, write_volume
from lgssl_nnunet.dataset_conversion.dataset import (
    IMAGE_FOLDERS,
    LABEL_FOLDERS,
    TRAIN,
    ConvertibleDataset,
    Layout,
    Prepare,
    PreparedCase,
    PrepareOptions,
    SourceCase,
)
from lgssl_nnunet.dataset_conversion.geometry import Geometry, rounded, snap
from lgssl_nnunet.dataset_conversion.twins import ImagePrint, Twins, find_twins, print_of, report
from lgssl_nnunet.dataset_conversion.unlabeled import find_unlabeled_cases, prepare_image
from lgssl_nnunet.dataset_conversion.volumes import (
    as_uint8,
    count_not_finite,
    find_files,
    label_values,
)
from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.files import (
    copy_file,
    file_signature,
    link_file,
    read_json_if_valid,
    remove_leftovers,
    write_json,
)
from lgssl_nnunet.locks import hold_lock, lock_beside
from lgssl_nnunet.paths import data_folders, dataset_number, use_data_folders
from lgssl_nnunet.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)

RECORDS = "conversion"
"""Folder of the raw dataset with a record of each case and `source.json`, which says what is converted here."""
SOURCE = "source.json"


@dataclass(frozen=True)
class Conversion:
    """What holds for every case of one call.

    Attributes:
        dataset: the published dataset.
        target: folder of the raw dataset.
        file_ending: of images and segmentations.
        link: link files of which no voxel changes.
        options: passed on to the layout's `prepare`.
    """

    dataset: ConvertibleDataset
    target: Path
    file_ending: str
    link: bool
    options: PrepareOptions

    def image_file(self, case: SourceCase) -> Path:
        """Return where the image of a case goes."""
        return self.target / IMAGE_FOLDERS[case.part] / f"{case.identifier}_0000{self.file_ending}"

    def label_file(self, case: SourceCase) -> Path:
        """Return where the segmentation of a case goes."""
        return self.target / LABEL_FOLDERS[case.part] / f"{case.identifier}{self.file_ending}"

    @property
    def records(self) -> CaseRecords:
        """What was converted before."""
        return CaseRecords(self.target, RECORDS, "converted", SOURCE)

    def key(self, case: SourceCase) -> dict[str, Any]:
        """Return what the outcome of a case depends on."""
        sources = [case.image, *([case.label] if case.label else [])]
        return {
            "sources": [file_signature(file) for source in sources for file in _files_of(source)],
            "part": case.part,
            "spacing": None if self.options.spacing is None else list(self.options.spacing),
            "link": self.link,
            "file_ending": self.file_ending,
        }


def convert(
    dataset: ConvertibleDataset,
    download: Path | str,
    *,
    output: Path | str | None = None,
    dataset_id: int | None = None,
    unlabeled: Path | str | None = None,
    link: bool = False,
    keep_spacing: bool = False,
    num_processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Convert a download of one dataset; the arguments are those of `lgssl_nnunet.convert_dataset`.

    Raises:
        UsageError: a folder does not exist, or the target holds something else.
        FolderBusyError: another process is converting into the target.
        DatasetError: the download is not as expected; every problem is listed, and the cases without one are kept.
        LGSSLError: there is not enough space on the disk.
    """
    if dataset_id is not None and dataset_id < 1:
        raise UsageError(f"-d {dataset_id}: give a positive number, such as {dataset.number}.")
    download = _existing_folder(download, "-i")
    layout = _with_unlabeled(choose_layout(dataset, download), unlabeled)
    options = PrepareOptions(None if keep_spacing else layout.spacing)
    target = _raw_root(output) / dataset.folder_name(dataset_id)
    conversion = Conversion(dataset, target, _file_ending(layout, link), link, options)
    _report(layout, conversion, download)
    _refuse_foreign_target(target, dataset, layout)
    with hold_lock(lock_beside(target, "conversion"), target):
        _convert_locked(layout, conversion, num_processes, progress)
    logger.info("%s is ready: lgssl_plan_and_preprocess -d %d", target, dataset_number(target.name))
    return target


def _convert_locked(layout: Layout, conversion: Conversion, num_processes: int | None, progress: bool) -> None:
    """Convert what is to be done, and write dataset.json when every case is."""
    dataset, target = conversion.dataset, conversion.target
    _refuse_foreign_target(target, dataset, layout)  # again: another process may have written since
    for folder in (*IMAGE_FOLDERS.values(), *LABEL_FOLDERS.values(), RECORDS):
        remove_leftovers(target / folder)
    cases = {case.identifier: case for case in layout.all_cases}
    unfinished = conversion.records.unfinished({name: conversion.key(case) for name, case in cases.items()})
    todo = {name: cases[name] for name in unfinished}
    remedy = "make room, choose another disk with -o, or use --link where the layout allows it"
    require_space(target, _written_anew(conversion, todo.values()), remedy)
    write_json({"dataset": dataset.key, "layout": layout.name}, conversion.records.source_file)
    _convert_cases(layout, conversion, todo, num_processes, progress)
    records = conversion.records.read()
    twins = find_twins({name: ImagePrint.from_json(record["print"]) for name, record in records.items()})
    for sentence in report(twins):
        logger.warning("%s", sentence)
    write_json(_dataset_json(layout, conversion, records, twins), target / "dataset.json")


def choose_layout(dataset: ConvertibleDataset, download: Path) -> Layout:
    """Return the one layout that a download has.

    Raises:
        DatasetError: it has none, several, or files that do not belong together.
    """
    layouts, problems = dataset.find_layouts(download)
    if not layouts and not problems:
        raise DatasetError(f"{download}: no layout of {dataset.key} was found; expected is {dataset.download}.")
    if len(layouts) > 1:
        names = "; ".join(f"{layout.name} ({len(layout.cases)} cases)" for layout in layouts)
        raise DatasetError(f"{download}: holds several layouts ({names}); give the folder of one of them with -i.")
    raise_if_any([*problems, *_repeated(layouts[0].cases if layouts else ())], f"{download}")
    return layouts[0]


def convert_case(case: SourceCase, prepare: Prepare, conversion: Conversion) -> dict[str, Any]:
    """Convert one case: image, then segmentation, then the record, each whole or absent.

    Args:
        case: where the files are.
        prepare: reads and repairs the case.
        conversion: where to write it, and how.

    Returns:
        The record: sources, changes, warnings, geometry.

    Raises:
        DatasetError: the case cannot be used; nothing of it was written.
    """
    key = conversion.key(case)
    prepared = prepare(case, conversion.options)
    _require_finite(prepared.image, case.image)
    label, missing = (None, []) if prepared.label is None else checked_label(prepared, case, conversion.dataset)
    files = [_write(conversion, prepared.image, case.image, prepared.image_as_is, conversion.image_file(case))]
    if label is not None:
        unchanged = prepared.label_as_is and conversion.link and label is prepared.label
        stored = label if unchanged else as_uint8(label)
        files.append(_write(conversion, stored, case.label, unchanged, conversion.label_file(case)))
    record = {
        "key": key,
        "labeled": label is not None,
        "changes": list(prepared.changes),
        "warnings": [*prepared.warnings, *missing],
        "geometry": _described(prepared.image),
        "print": _print(prepared.image, label).to_json(),
    }
    return conversion.records.write(case.identifier, record, files)


def checked_label(
    prepared: PreparedCase, case: SourceCase, dataset: ConvertibleDataset
) -> tuple[sitk.Image, list[str]]:
    """Return a case's segmentation on the grid of its image, and a warning if a class is missing.

    Raises:
        DatasetError: the grids differ beyond rounding, a value is unknown, or there is no foreground.
    """
    image, label = prepared.image, prepared.label
    differences = Geometry.of(label).differences(Geometry.of(image), case.image.name)
    if differences:
        raise DatasetError(f"{case.label}: {', '.join(differences)}; resample it to the image's grid.")
    values = set(label_values(label, case.label).tolist())
    unknown = sorted(values.difference(dataset.labels.values()))
    if unknown:
        shown = ", ".join(str(value) for value in unknown[:5])
        last = max(dataset.labels.values())
        raise DatasetError(f"{case.label}: holds the value {shown}, {dataset.key} has 0 to {last}; correct the file.")
    if values <= {0}:
        raise DatasetError(f"{case.label}: nothing is segmented; download it again or remove it.")
    absent = [n for n, value in dataset.labels.items() if value not in values and n not in dataset.optional_labels]
    missing = [f"the segmentation lacks {', '.join(absent)}"] if absent and absent != ["background"] else []
    same = Geometry.of(label) == Geometry.of(image)
    return label if same else snap(label, image), missing


def _require_finite(image: sitk.Image, path: Path) -> None:
    wrong = count_not_finite(path, sitk.GetArrayViewFromImage(image))
    if wrong:
        raise DatasetError(f"{path}: {wrong} voxels are NaN or infinite; replace them by a value that makes sense.")


def _write(conversion: Conversion, image: sitk.Image, source: Path, as_is: bool, target: Path) -> Path:
    if as_is and source.name.endswith(conversion.file_ending) and nib.load(source).ndim == 3:
        (link_file if conversion.link else copy_file)(source, target)
    else:
        write_volume(target, conversion.file_ending, lambda named: sitk.WriteImage(image, str(named), True))
    return target


def _print(image: sitk.Image, label: sitk.Image | None) -> ImagePrint:
    array = None if label is None else sitk.GetArrayViewFromImage(label)
    return print_of(sitk.GetArrayViewFromImage(image), image.GetSpacing()[::-1], array)


def _described(image: sitk.Image) -> dict[str, Any]:
    geometry = Geometry.of(image)
    return {
        "size": list(geometry.size),
        "spacing": rounded(geometry.spacing),
        "origin": rounded(geometry.origin),
        "direction": rounded(geometry.direction),
    }


def _files_of(source: Path) -> list[Path]:
    """Return the files of a case's image: itself, or those of a DICOM series."""
    return find_files(source, "*") if source.is_dir() else [source]


def _existing_folder(folder: Path | str, flag: str) -> Path:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UsageError(f"{flag} {folder}: this folder does not exist; give the folder of the download.")
    return path


def _with_unlabeled(layout: Layout, folder: Path | str | None) -> Layout:
    if folder is None:
        return layout
    extra = find_unlabeled_cases(_existing_folder(folder, "--unlabeled"))
    raise_if_any(_repeated([*layout.cases, *extra]), f"--unlabeled {folder}")
    return replace(layout, extra=tuple(extra))


def _repeated(cases: Iterable[SourceCase]) -> list[Problem]:
    seen: dict[str, SourceCase] = {}
    problems = []
    for case in cases:
        first = seen.setdefault(case.identifier.lower(), case)
        if first is not case:
            found = f"is the same case as {first.image}"
            problems.append(Problem(str(case.image), found, "remove or rename one of the two"))
    return problems


def _raw_root(output: Path | str | None) -> Path:
    if output is not None:
        return Path(output).expanduser().resolve()
    use_data_folders()
    return data_folders()["nnUNet_raw"].path


def _file_ending(layout: Layout, link: bool) -> str:
    """Return `.nii.gz`, unless links to uncompressed files save writing them."""
    uncompressed = all(case.image.suffix == ".nii" for case in layout.all_cases)
    return ".nii" if link and uncompressed else ".nii.gz"


def _report(layout: Layout, conversion: Conversion, download: Path) -> None:
    logger.info("%s: found the layout %s with %s.", download, layout.name, _counted(layout.all_cases))
    for name, reason in layout.left_out.items():
        logger.warning("%s is left out: %s.", name, reason)
    for warning in layout.warnings:
        logger.warning("%s", warning)
    if layout.processing:
        logger.warning("These images are not as the scanner made them: %s.", layout.processing)
    if layout.spacing is not None:
        shown = "kept as in the headers" if conversion.options.spacing is None else f"{rounded(layout.spacing)} mm"
        logger.warning("This layout has lost its spacing, documented as %s; it is %s.", rounded(layout.spacing), shown)
    logger.info("Terms of use: %s", conversion.dataset.licence)


def _counted(cases: Iterable[SourceCase]) -> str:
    parts = [case.part for case in cases]
    return ", ".join(f"{parts.count(part)} {part} cases" for part in IMAGE_FOLDERS if part in parts)


def _refuse_foreign_target(target: Path, dataset: ConvertibleDataset, layout: Layout) -> None:
    refuse_taken_number(target, "-d")
    if not target.exists() or not any(target.iterdir()):
        return
    source = read_json_if_valid(target / RECORDS / SOURCE) or {}
    if source.get("dataset") != dataset.key:
        raise UsageError(f"{target}: holds another dataset; choose another id with -d or another folder with -o.")
    if source.get("layout") != layout.name:
        raise UsageError(
            f"{target}: was converted from another layout ({source.get('layout')}); remove it or choose another id "
            "with -d."
        )


def _written_anew(conversion: Conversion, cases: Iterable[SourceCase]) -> Iterator[Path]:
    """Yield the files of which a converted copy is made."""
    for case in cases:
        for source in filter(None, (case.image, case.label)):
            if not (conversion.link and source.name.endswith(conversion.file_ending)):
                yield from _files_of(source)


def _convert_cases(
    layout: Layout,
    conversion: Conversion,
    todo: Mapping[str, SourceCase],
    num_processes: int | None,
    progress: bool,
) -> None:
    extra = {case.identifier for case in layout.extra}
    tasks = {n: (case, prepare_image if n in extra else layout.prepare, conversion) for n, case in todo.items()}
    made = conversion.records.make(
        convert_case, tasks, num_processes=num_processes, description="Converting", progress=progress
    )
    for name, record in made:
        for warning in record["warnings"]:
            logger.warning("%s: %s.", name, warning)


def _dataset_json(
    layout: Layout, conversion: Conversion, records: Mapping[str, dict[str, Any]], twins: Iterable[Twins]
) -> dict[str, Any]:
    dataset = conversion.dataset
    parts = {part: [n for n, r in records.items() if r["key"]["part"] == part] for part in IMAGE_FOLDERS}
    spacing = conversion.options.spacing
    return {
        "name": dataset.name,
        "channel_names": {"0": dataset.derived_channel if layout.processing else dataset.channel},
        "labels": dict(dataset.labels),
        "prompts": dict(dataset.prompts),
        "numTraining": sum(records[name]["labeled"] for name in parts[TRAIN]),
        "file_ending": conversion.file_ending,
        "licence": dataset.licence,
        "reference": dataset.reference,
        "conversion": {
            "tool": f"lgssl_nnunet {lgssl_nnunet.__version__}",
            "dataset": dataset.key,
            "layout": layout.name,
            "derived": bool(layout.processing),
            "processing": layout.processing,
            "spacing": "from the headers" if spacing is None else f"lost; set to {rounded(spacing)} mm as documented",
            "cases": {part: len(names) for part, names in parts.items()},
            "left_out": dict(layout.left_out),
            "notes": list(layout.warnings),
            "twins": [str(pair) for pair in twins],
            "changes": {name: record["changes"] for name, record in records.items() if record["changes"]},
            "warnings": {name: record["warnings"] for name, record in records.items() if record["warnings"]},
        },
    }
