"""Several raw datasets become one with the union of their classes: the function behind `lgssl_merge_datasets`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import lgssl_nnunet
from lgssl_nnunet.dataset_conversion.case_records import CaseRecords, refuse_taken_number, require_space, write_volume
from lgssl_nnunet.dataset_conversion.dataset import IMAGE_FOLDERS, LABEL_FOLDERS, TEST, TRAIN, UNLABELED
from lgssl_nnunet.dataset_conversion.volumes import last_line, require_intact
from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.files import copy_file, file_signature, link_file, read_json_if_valid, remove_leftovers, write_json
from lgssl_nnunet.locks import hold_lock, lock_beside
from lgssl_nnunet.paths import data_folders, dataset_number
from lgssl_nnunet.plans.cases import Case, find_reader
from lgssl_nnunet.plans.merged_classes import (
    MergedClass,
    look_alike,
    merge_classes,
    merged_prompts,
    parts_joined,
    parts_left_out,
)
from lgssl_nnunet.plans.merged_edits import with_edits, write_with_edits
from lgssl_nnunet.plans.merged_sources import (
    Source,
    annotated_and_groups,
    annotation_problems,
    common_format,
    load_sources,
    merged_channels,
)
from lgssl_nnunet.problems import first_of, raise_if_any
from lgssl_nnunet.text.prompts import has_regions, prompt_modality

logger = logging.getLogger(__name__)

RECORDS, SOURCES = "merge", "sources.json"
"""Folder of the merged dataset with a record of each case, and the file in it that says what is merged and how."""
WRITTEN = "dataset.json.written"
"""In the same folder: dataset.json as it was written, by which edits are known."""
PROVENANCE = "provenance.json"
"""Beside dataset.json: dataset and case that each case comes from."""
_MOST_IN_WARNING = 5


@dataclass(frozen=True)
class MergedFolder:
    """Where the cases go, and how.

    Attributes:
        target: folder of the merged dataset.
        file_ending: of all images and labels.
        link: link files instead of copying them.
    """

    target: Path
    file_ending: str
    link: bool

    @property
    def records(self) -> CaseRecords:
        """What was merged before."""
        return CaseRecords(self.target, RECORDS, "merged", SOURCES)

    @property
    def description(self) -> tuple[Path, Path]:
        """Its dataset.json, and the copy of what was written there."""
        return self.target / "dataset.json", self.target / RECORDS / WRITTEN


@dataclass(frozen=True)
class Merge:
    """What holds for every case of one call.

    Attributes:
        sources: the datasets.
        classes: those of the merged dataset; the first one has the value 1.
        channel_names: of the merged dataset.
        folder: where it goes.
    """

    sources: tuple[Source, ...]
    classes: tuple[MergedClass, ...]
    channel_names: Mapping[str, str]
    folder: MergedFolder

    @property
    def labels(self) -> dict[str, int]:
        """Value by class name; the ignore label, if a dataset has one, comes last."""
        names = ["background", *(entry.name for entry in self.classes)]
        ignoring = any(source.ignore is not None for source in self.sources)
        return {name: value for value, name in enumerate([*names, "ignore"] if ignoring else names)}

    def values(self, source: Source) -> dict[int, int]:
        """Return the merged value of each label value of a dataset."""
        names = source.names(self.classes)
        values = {0: 0, **{member.value: self.labels[names[member.name]] for member in source.classes}}
        return values if source.ignore is None else {**values, source.ignore: self.labels["ignore"]}

    def values_to_write(self, source: Source) -> dict[int, int] | None:
        """Return the `values` if the labels of a dataset are written anew; None if they can stay as they are.

        Where the merged dataset alone has an ignore label, a stray value could become one unseen, so they are read.
        """
        values = self.values(source)
        stray = source.ignore is None and "ignore" in self.labels
        return values if stray or _some_change(values) else None

    def made_of(self) -> dict[str, Any]:
        """Return what a merged folder must agree in to be continued."""
        values = {source.name: {str(old): new for old, new in self.values(source).items()} for source in self.sources}
        return {"values": values, "labels": self.labels, "channel_names": dict(self.channel_names)}


@dataclass(frozen=True)
class MergedCase:
    """One case on its way into the merged dataset.

    Attributes:
        identifier: what it is called there.
        dataset: where it comes from.
        case: what it is called there.
        images: its files, one per channel.
        label: its label file; None for an unlabelled case.
        part: `TRAIN`, `TEST` or `UNLABELED`: which folder it belongs to.
        values: merged value by value of its label file; None if the file can stay as it is.
    """

    identifier: str
    dataset: str
    case: str
    images: tuple[Path, ...]
    label: Path | None
    part: str
    values: Mapping[int, int] | None

    def key(self, link: bool) -> dict[str, Any]:
        """Return what the outcome depends on."""
        files = [*self.images, *([self.label] if self.label else [])]
        values = None if self.values is None else sorted(map(list, self.values.items()))
        return {"sources": [file_signature(f) for f in files], "part": self.part, "values": values, "link": link}


def merge_datasets(
    datasets: Sequence[int | str],
    output: int | str,
    *,
    same: Sequence[Sequence[str]] = (),
    keep_apart: Sequence[str] = (),
    channel_names: Sequence[str] | None = None,
    copy: bool = False,
    dry_run: bool = False,
    num_processes: int | None = None,
    progress: bool = True,
) -> Path:
    """Merge raw datasets into one with the union of their classes, and say which dataset annotates which.

    Images, and labels of which no value changes, are linked. Labels of unlabelled cases are not opened, nor are those
    that can be linked; those of a dataset without an ignore label are written anew if another one has such a label,
    since a value that the dataset does not know could become it. Everything that is wrong is told at once, before
    anything is written; the same call again does what is missing, or new in the datasets, and keeps what was changed in
    the merged dataset.json.

    Args:
        datasets: ids or names in nnUNet_raw, two or more.
        output: id (600) or name ("Dataset600_Abdomen") of the merged dataset; the id alone names Dataset600_Merged.
        same: groups of classes that are one, by name or as "501:NAME"; the first name is that of the class.
        keep_apart: classes that are one with no other although they are called alike, by name or as "501:NAME".
        channel_names: names of the channels; None to take those of the datasets where they fit together.
        copy: copy files instead of linking them.
        dry_run: list the classes and what is wrong, and write nothing.
        num_processes: worker processes that change labels; 0 for none, None for at most 8, one per core.
        progress: show a progress bar.

    Returns:
        The folder of the merged dataset.

    Raises:
        UsageError: fewer than two datasets, an output that holds or is called like something else, or a merged
            dataset.json that was changed in what is to be written anew.
        DatasetError: the datasets do not fit together, or have problems of their own, all listed; or labels that
            could not be read, named after all others were done.
        FolderBusyError: another process is writing into the output.
        LGSSLError: there is not enough space on the disk.
    """
    target = _target(output)
    merge = _checked(datasets, target, same, keep_apart, channel_names, link=not copy)
    description = _dataset_json(merge)
    _refuse_foreign_target(merge, description)
    _tell(merge)
    if not dry_run:
        with hold_lock(lock_beside(target, "conversion"), target):
            _refuse_foreign_target(merge, description)  # again: another process may have written since
            _write(merge, description, num_processes, progress)
        logger.info("%s is ready: lgssl_plan_and_preprocess -d %d", target, dataset_number(target.name))
    return target


def merge_case(case: MergedCase, folder: MergedFolder, reader: type | None) -> dict[str, Any]:
    """Link or copy the files of one case, with its label's values changed where they must be; each whole or absent.

    Args:
        case: where the files are.
        folder: where they go.
        reader: nnU-Net's reader class; needed where values change.

    Returns:
        The record: dataset and case that it comes from.

    Raises:
        DatasetError: the label cannot be read or holds unknown values; no record was written.
    """
    key, place = case.key(folder.link), link_file if folder.link else copy_file
    images, labels = (folder.target / folders.get(case.part, "") for folders in (IMAGE_FOLDERS, LABEL_FOLDERS))
    files = [images / f"{case.identifier}_{n:04d}{folder.file_ending}" for n in range(len(case.images))]
    for image, file in zip(case.images, files, strict=True):
        place(image, file)
    if case.label is not None:
        files.append(labels / f"{case.identifier}{folder.file_ending}")
        if case.values is None:
            place(case.label, files[-1])
        else:
            _write_changed(case.label, case.values, files[-1], folder.file_ending, reader)
    record = {"key": key, "dataset": case.dataset, "case": case.case, "labeled": case.label is not None}
    return folder.records.write(case.identifier, record, files)


def _write_changed(label: Path, values: Mapping[int, int], target: Path, file_ending: str, reader: type) -> None:
    """Write a label file with other values; a damaged one is refused, which would pass for a sound one in the copy."""
    require_intact(label, "replace them by values of dataset.json")
    try:
        voxels, properties = reader().read_seg(str(label))
    except Exception as error:
        raise DatasetError(f"{label}: cannot be read ({last_line(error)}); copy or export it again.") from None
    unknown = sorted(set(np.unique(voxels).tolist()).difference(values))
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:5])
        raise DatasetError(f"{label}: holds the value {shown}, which dataset.json does not know; correct one of them.")
    table = np.zeros(max(values) + 1, dtype=np.uint16)
    table[list(values)] = list(values.values())
    changed = table[voxels.astype(np.int64)][0]
    write_volume(target, file_ending, lambda named: reader().write_seg(changed, str(named), properties))


def _some_change(values: Mapping[int, int]) -> bool:
    return any(old != new for old, new in values.items())


def _target(output: int | str) -> Path:
    """Return the folder of the merged dataset; an id finds the one that was merged under it before."""
    raw = data_folders()["nnUNet_raw"].path
    if dataset_number(str(output)) is not None:
        return raw / str(output)
    if not str(output).isdecimal() or int(output) < 1:
        raise UsageError(f"-o {output}: give an id such as 600, or a name such as Dataset600_Abdomen.")
    merged = [file.parents[1] for file in raw.glob(f"Dataset*/{RECORDS}/{SOURCES}")]
    found = [folder for folder in merged if dataset_number(folder.name) == int(output)]
    return found[0] if len(found) == 1 else raw / f"Dataset{int(output):03d}_Merged"


def _checked(
    datasets: Sequence[int | str],
    target: Path,
    same: Sequence[Sequence[str]],
    keep_apart: Sequence[str],
    channel_names: Sequence[str] | None,
    *,
    link: bool,
) -> Merge:
    """Load the datasets and decide classes and channels; all problems are raised together."""
    sources, problems = load_sources(datasets)
    channels: dict[str, str] = {}
    if len(sources) > 1:
        problems += common_format(sources)
        if len({source.dataset.num_channels for source in sources}) == 1:
            channels, unfit = merged_channels(sources, channel_names)
            problems += unfit
    # With a dataset missing, its classes would be called unknown.
    complete = len(sources) == len(datasets)
    classes, unclear = merge_classes([member for source in sources for member in source.classes], same, keep_apart)
    sound = [
        source for source in sources if not source.dataset.problems and not has_regions(source.dataset.dataset_json)
    ]
    unclear += [problem for source in sound for problem in annotation_problems(source, classes)]
    raise_if_any([*problems, *(unclear if complete else [])], f"The merge into {target.name}")
    folder = MergedFolder(target, sources[0].dataset.file_ending, link)
    return Merge(tuple(sources), tuple(classes), channels, folder)


def _refuse_foreign_target(merge: Merge, description: Mapping[str, Any]) -> None:
    target = merge.folder.target
    refuse_taken_number(target, "-o")
    if not target.exists() or not any(target.iterdir()):
        return
    earlier = read_json_if_valid(merge.folder.records.source_file)
    if earlier is None:
        raise UsageError(f"{target}: holds another dataset; choose another id with -o.")
    if earlier != merge.made_of():
        raise UsageError(
            f"{target}: was merged from other datasets or with other classes or channels; remove it or choose another "
            "id with -o."
        )
    with_edits(description, *merge.folder.description)


def _write(merge: Merge, description: Mapping[str, Any], num_processes: int | None, progress: bool) -> None:
    """Make what is missing, remove what the datasets do not have any more, and write dataset.json."""
    target, records = merge.folder.target, merge.folder.records
    for folder in (*IMAGE_FOLDERS.values(), *LABEL_FOLDERS.values(), RECORDS):
        remove_leftovers(target / folder)
    cases = {case.identifier: case for source in merge.sources for case in _cases(merge, source)}
    todo = [cases[name] for name in records.unfinished({n: case.key(merge.folder.link) for n, case in cases.items()})]
    remedy = "make room" if merge.folder.link else "make room, or leave out --copy"
    require_space(target, _written_anew(merge.folder, todo), remedy)
    write_json(merge.made_of(), records.source_file)
    for name in sorted(set(records.read()).difference(cases)):
        logger.info("%s is not in its dataset any more and is removed.", name)
        records.remove(name)
    _make(merge, todo, num_processes, progress)
    provenance = {name: {"dataset": case.dataset, "case": case.case} for name, case in sorted(cases.items())}
    write_json(provenance, target / PROVENANCE)
    write_with_edits(description, *merge.folder.description)


def _make(merge: Merge, cases: Sequence[MergedCase], num_processes: int | None, progress: bool) -> None:
    """Make cases: in worker processes if labels are to be changed, for which they are read."""
    changing = any(case.label is not None and case.values is not None for case in cases)
    example = next(iter(merge.sources[0].dataset.cases.values())).images[0]
    reader = find_reader(_description(merge), example) if changing else None
    tasks = {case.identifier: (case, merge.folder, reader) for case in cases}
    processes = num_processes if changing else 0
    made = merge.folder.records.make(
        merge_case, tasks, num_processes=processes, description="Merging", progress=progress
    )
    for name, _ in made:
        logger.debug("%s is merged.", name)


def _cases(merge: Merge, source: Source) -> Iterator[MergedCase]:
    """Yield the cases of a dataset, training and test."""
    values = merge.values_to_write(source)

    def merged(case: Case, part: str) -> MergedCase:
        identifier = source.identifier(case.identifier)
        return MergedCase(identifier, source.name, case.identifier, case.images, case.label, part, values)

    for case in source.dataset.cases.values():
        # A listed image may lie in any folder, and only imagesTr has one for labels beside it.
        unlabeled = case.label is None and case.images[0].parent.name == IMAGE_FOLDERS[UNLABELED]
        yield merged(case, UNLABELED if unlabeled else TRAIN)
    for case in source.test.values():
        yield merged(case, TEST)


def _written_anew(folder: MergedFolder, cases: Sequence[MergedCase]) -> Iterator[Path]:
    """Yield the files that are copied or changed instead of linked."""
    for case in cases:
        if not folder.link:
            yield from case.images
        if case.label is not None and (case.values is not None or not folder.link):
            yield case.label


def _description(merge: Merge) -> dict[str, Any]:
    """Return what nnU-Net needs of dataset.json."""
    description = {
        "channel_names": dict(merge.channel_names),
        "labels": merge.labels,
        "file_ending": merge.folder.file_ending,
    }
    reader = merge.sources[0].dataset.dataset_json.get("overwrite_image_reader_writer")
    return description | ({"overwrite_image_reader_writer": reader} if reader else {})


def _dataset_json(merge: Merge) -> dict[str, Any]:
    annotated: dict[str, list[str]] = {}
    groups: dict[str, list[str]] = {}
    for source in merge.sources:
        of_source = annotated_and_groups(source, merge.classes)
        annotated |= of_source[0]
        groups |= of_source[1]
    terms = {
        key: "; ".join(
            f"{source.name}: {source.dataset.dataset_json[key]}"
            for source in merge.sources
            if source.dataset.dataset_json.get(key)
        )
        for key in ("licence", "reference")
    }
    return {
        "name": merge.folder.target.name.partition("_")[2],
        **_description(merge),
        "prompts": merged_prompts(merge.classes, mixed=_is_mixed(merge)),
        "numTraining": sum(len(source.dataset.labeled) for source in merge.sources),
        "annotated": annotated,
        "groups": groups,
        **{key: text for key, text in terms.items() if text},
        "merged": {
            "tool": f"lgssl_nnunet {lgssl_nnunet.__version__}",
            "classes": {source.name: source.names(merge.classes) for source in merge.sources},
            "cases": {origin: source.counts(origin) for source in merge.sources for origin in source.origins},
        },
    }


def _is_mixed(merge: Merge) -> bool:
    return len({prompt_modality(source.dataset.dataset_json) for source in merge.sources}) > 1


def _tell(merge: Merge) -> None:
    """List what comes out: classes with what they are made of, channels, cases."""
    logger.info("Classes of %s:", merge.folder.target.name)
    width = max(len(entry.name) for entry in merge.classes)
    for value, entry in enumerate(merge.classes, 1):
        members = ", ".join(map(str, entry.members))
        why = f"  [one class {entry.reason}]" if entry.reason else ""
        logger.info("  %2d %-*s  %s%s", value, width, entry.name, members, why)
    if "ignore" in merge.labels:
        logger.info("  %2d %-*s  voxels to be ignored", merge.labels["ignore"], width, "ignore")
    logger.info("Channels: %s", ", ".join(merge.channel_names.values()))
    for source in merge.sources:
        counts = "{labeled} labelled, {unlabeled} unlabelled, {test} test".format_map(source.counts(source.name))
        logger.info("%s: %s; %s", source.name, counts, _told_of_labels(merge.values_to_write(source)))
    _warn_about_contradictions(merge.classes)


def _told_of_labels(values: Mapping[int, int] | None) -> str:
    if values is None:
        return "labels stay"
    return "values of labels change" if _some_change(values) else "labels are checked for values that would be ignored"


def _warn_about_contradictions(classes: Sequence[MergedClass]) -> None:
    """Say which classes may be one structure, or contain each other, so that a voxel has two values in two datasets."""
    pairs = [f"{first.name!r} and {second.name!r}" for first, second in look_alike(classes)]
    if pairs:
        logger.warning(
            "Classes that look alike and stay apart: %s. Join what is one structure with --same; where one contains "
            'the other, as "kidney" a "left kidney", the labels of the datasets contradict each other.',
            first_of(pairs, _MOST_IN_WARNING),
        )
    alone = [f"{dataset} has {whole.name!r} without {part.name!r}" for dataset, whole, part in parts_left_out(classes)]
    if alone:
        logger.warning(
            "Classes whose part is a class of other datasets: %s. Where the labels count the part to the whole, the "
            "datasets contradict each other: join the two with --same, or make the whole a region in the merged "
            "dataset.json (docs/merging_datasets.md).",
            first_of(alone, _MOST_IN_WARNING),
        )
    partial = [
        f"{dataset} has only {' and '.join(repr(member.name) for member in members)} of {entry.name!r}"
        for dataset, entry, members in parts_joined(classes)
    ]
    if partial:
        logger.warning(
            "Joined classes of which a dataset may label a part: %s. What it lacks counts as background there. If "
            "its images show that, take the class out of the dataset's lists in 'annotated' of the merged "
            "dataset.json; the merge keeps this (docs/merging_datasets.md).",
            first_of(partial, _MOST_IN_WARNING),
        )
