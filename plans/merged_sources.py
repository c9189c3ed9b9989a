"""The datasets that are merged: loaded, and whether they fit together."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from lgssl_nnunet.errors import LGSSLError, UsageError
from lgssl_nnunet.paths import dataset_number
from lgssl_nnunet.plans.cases import Case, RawDataset, held_out_cases, load_raw_dataset, missing_channels
from lgssl_nnunet.plans.merged_classes import MergedClass, SourceClass, classes_of, label_value
from lgssl_nnunet.plans.merged_planning import merged_from
from lgssl_nnunet.plans.partial_labels import annotation_problems as problems_of_groups
from lgssl_nnunet.plans.partial_labels import named_cases
from lgssl_nnunet.problems import Problem
from lgssl_nnunet.text.prompts import OTHER, modality_of

_WITH_A_SECOND_FILE = (".tif", ".tiff")
"""Formats for which nnU-Net keeps the spacing in a JSON file beside the image."""
_MOST_AXES = 3


@dataclass(frozen=True)
class Source:
    """One of the datasets that are merged.

    Attributes:
        dataset: its raw dataset.
        test: the cases in imagesTs, with their files in labelsTs.
        classes: its foreground classes.
    """

    dataset: RawDataset
    test: Mapping[str, Case]
    classes: tuple[SourceClass, ...]

    @property
    def name(self) -> str:
        """`DatasetXXX_Name`, which also names the group of its cases."""
        return self.dataset.name

    @property
    def ignore(self) -> int | None:
        """Value of its ignore label, if it has one."""
        value = self.dataset.dataset_json["labels"].get("ignore")
        return None if value is None else label_value(value)

    @property
    def origins(self) -> list[str]:
        """By which names its cases begin in the merged dataset: its own, or those of what it was merged from."""
        return [self.identifier(name) for name in merged_from(self.dataset.dataset_json)] or [self.name]

    def counts(self, origin: str) -> dict[str, int]:
        """Return the numbers of labelled, unlabelled and test cases from one of the `origins`, or by its own name."""
        kinds = {"labeled": self.dataset.labeled, "unlabeled": self.dataset.unlabeled, "test": self.test}
        return {
            kind: sum(self.identifier(case).startswith(f"{origin}_") for case in cases) for kind, cases in kinds.items()
        }

    def identifier(self, case: str) -> str:
        """Return what a case of this dataset is called in the merged one, whatever else is merged."""
        return f"{self.name}_{case}"

    def names(self, merged: Sequence[MergedClass]) -> dict[str, str]:
        """Return the name in the merged dataset of each of its classes."""
        return {member.name: entry.name for entry in merged for member in entry.members if member.dataset == self.name}


def load_sources(datasets: Sequence[int | str]) -> tuple[list[Source], list[Problem | LGSSLError]]:
    """Load the datasets to merge; no image and no label is opened.

    Args:
        datasets: ids or names, two or more.

    Returns:
        The datasets that could be loaded, and everything that is wrong with them.

    Raises:
        UsageError: fewer than two datasets, or one twice.
    """
    numbers = [str(dataset_number(str(dataset)) or dataset).lstrip("0") for dataset in datasets]
    if len(set(numbers)) < max(2, len(numbers)):
        raise UsageError(f"-d {' '.join(map(str, datasets))}: give two or more datasets, each once.")
    sources, problems = [], []
    for dataset in datasets:
        try:
            raw = _with_groups_checked(load_raw_dataset(dataset))
            test = _test_cases(raw)
            of_files = [*raw.problems, *missing_channels(test, raw.dataset_json)]
            problems += [replace(problem, file=f"{raw.name}/{problem.file}") for problem in of_files]
            problems += _own_problems(raw, test)
            sources.append(Source(raw, test, tuple(classes_of(raw.name, _without_regions(raw)))))
        except LGSSLError as error:
            problems.append(error)
    return sources, problems


def common_format(sources: Sequence[Source]) -> list[Problem]:
    """Return what keeps the files of the datasets from lying in one.

    Compared are file endings, readers, numbers of dimensions (by the images' headers), channels, files per case.
    """
    problems = []
    for what, remedy in (
        ("file_ending", "convert the images and labels of all to one format, such as .nii.gz"),
        ("overwrite_image_reader_writer", "name the same reader in each dataset.json, or none"),
    ):
        found = {source.name: source.dataset.dataset_json.get(what) for source in sources}
        if len(set(found.values())) > 1:
            problems.append(Problem("dataset.json", f"{what} differs ({_shown(found)})", remedy))
    dimensions = {source.name: number for source in sources if (number := _dimensions(source)) is not None}
    if len(set(dimensions.values())) > 1:
        remedy = "merge volumes with volumes and single slices with single slices"
        problems.append(Problem("imagesTr", f"the number of dimensions differs ({_shown(dimensions)})", remedy))
    numbers = {source.name: source.dataset.num_channels for source in sources}
    if len(set(numbers.values())) > 1:
        remedy = "merge datasets whose images have the same channels"
        problems.append(Problem("dataset.json", f"the number of channels differs ({_shown(numbers)})", remedy))
        return problems
    files = {source.name: max(len(case.images) for case in source.dataset.cases.values()) for source in sources}
    if len(set(files.values())) > 1:
        remedy = "write one file per channel in each dataset"
        problems.append(Problem("imagesTr", f"the number of files per case differs ({_shown(files)})", remedy))
    return problems


def merged_channels(
    sources: Sequence[Source], asked: Sequence[str] | None = None
) -> tuple[dict[str, str], list[Problem]]:
    """Return the `channel_names` of the merged dataset and what is wrong with them.

    nnU-Net chooses the normalisation of a channel by its name, once for the whole dataset: by statistics of all images
    for CT, by the image's own mean and deviation (z-score) for every name that it does not know. Different names that
    mean the same normalisation are joined to "T1 or T2", which nnU-Net does not know and in which the prompts see both.

    Args:
        sources: datasets with the same number of channels.
        asked: names that the user gives; None to take those of the datasets.
    """
    channels = [source.dataset.dataset_json["channel_names"] for source in sources]
    count = len(channels[0])
    found = [list(dict.fromkeys(str(names[str(index)]) for names in channels)) for index in range(count)]
    places = [_places(names) for names in channels]
    misplaced = [_misplaced(index, found[index], places) for index in range(count)]
    if asked is None:
        problems = [
            problem for index in range(count) for problem in misplaced[index] or _channel_problems(index, found)
        ]
        return {str(index): " or ".join(_one_spelling(names)) for index, names in enumerate(found)}, problems
    if len(asked) != count:
        remedy = "give one name per channel, in order"
        return {}, [Problem("--channel_names", f"has {len(asked)} names for {count} channels", remedy)]
    problems = [
        problem
        for index, name in enumerate(asked)
        for problem in misplaced[index] or _lies(name, found[index], "--channel_names")
    ]
    return {str(index): name for index, name in enumerate(asked)}, problems


def annotated_and_groups(
    source: Source, merged: Sequence[MergedClass]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return what a dataset contributes to `annotated` and `groups` of the merged dataset.json.

    Each dataset is a group, and keeps the groups that it has. The classes of one without `annotated` are annotated
    there; of one that has it, the other cases are a group of their own: a case may be in one annotated group only.
    """
    groups, annotated = (source.dataset.dataset_json.get(key) or {} for key in ("groups", "annotated"))
    everything = _annotated_by(source, merged, [member.name for member in source.classes])
    whole = {source.name: [f"{glob.escape(source.name)}_*"]}
    if not annotated:
        return {source.name: everything}, whole | _renamed(source, groups)
    keys = {f"{source.name}/{key}" if key in groups else source.identifier(key): key for key in annotated}
    mine = {new: _annotated_by(source, merged, annotated[key]) for new, key in keys.items()}
    cases = [*source.dataset.cases, *source.test]
    named = named_cases(annotated, groups, set(cases))
    rest = [case for case in cases if case not in named]
    if rest:  # unlabelled ones too, which may get a label in the merged dataset
        name = _unused("other", groups)
        mine[f"{source.name}/{name}"] = everything
        groups = groups | {name: [glob.escape(case) for case in rest]}
    return mine, whole | _renamed(source, groups)


def annotation_problems(source: Source, merged: Sequence[MergedClass]) -> list[Problem]:
    """Return which cases or groups of a dataset would annotate nothing: only parts of classes that were joined."""
    empty = [key for key, names in annotated_and_groups(source, merged)[0].items() if not names]
    remedy = "join other classes with --same, or leave out the label files of these cases"
    return [
        Problem(f"{source.name}/dataset.json", f"{key} annotates parts of joined classes only", remedy) for key in empty
    ]


def _renamed(source: Source, groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return groups as they are in the merged dataset: the dataset's name before those of groups and cases."""
    return {
        f"{source.name}/{name}": [f"{glob.escape(source.name)}_{pattern}" for pattern in patterns]
        for name, patterns in groups.items()
    }


def _unused(name: str, groups: Mapping[str, Any]) -> str:
    return name if name not in groups else _unused(f"{name}_", groups)


def _annotated_by(source: Source, merged: Sequence[MergedClass], names: Sequence[str]) -> list[str]:
    """Return the merged classes of which all that the dataset has is annotated."""
    own = {entry.name: [m.name for m in entry.members if m.dataset == source.name] for entry in merged}
    return [name for name, members in own.items() if members and set(members) <= set(names)]


def _with_groups_checked(raw: RawDataset) -> RawDataset:
    """Return a dataset with the problems of its groups, which are not looked at without `annotated` before a merge."""
    if "annotated" in raw.dataset_json or not raw.dataset_json.get("groups"):
        return raw
    problems = problems_of_groups(raw.dataset_json | {"annotated": {}}, [*raw.cases, *raw.test])
    return replace(raw, problems=(*raw.problems, *problems))


def _own_problems(raw: RawDataset, test: Mapping[str, Case]) -> list[Problem]:
    labels = raw.dataset_json["labels"]
    regions = [name for name, value in labels.items() if not isinstance(value, int) and len(value) > 1]
    problems = []
    if regions:
        remedy = "give every class one value, without regions, and name unions of classes after the merge"
        problems.append(Problem(f"{raw.name}/dataset.json", f"has the regions {', '.join(regions)}", remedy))
    if raw.file_ending in _WITH_A_SECOND_FILE:
        remedy = "convert them, for example to .nii.gz"
        problem = f"{raw.file_ending} images have their spacing in a second file"
        problems.append(Problem(f"{raw.name}/dataset.json", problem, remedy))
    for name in sorted(set(raw.cases) & set(test)):
        problems.append(Problem(f"{raw.name}/{name}", "is a training case and a test case", "rename one of the two"))
    return problems


def _without_regions(raw: RawDataset) -> dict[str, Any]:
    """Return dataset.json without regions, which are refused already, so that other problems are found beside them."""
    labels = {n: v for n, v in raw.dataset_json["labels"].items() if isinstance(v, int) or len(v) == 1}
    prompts = {n: text for n, text in (raw.dataset_json.get("prompts") or {}).items() if n in labels}
    return raw.dataset_json | {"labels": labels, "prompts": prompts}


def _test_cases(raw: RawDataset) -> dict[str, Case]:
    found = {}
    for name, case in held_out_cases(raw.folder, raw.dataset_json).items():
        label = raw.folder / "labelsTs" / f"{name}{raw.file_ending}"
        found[name] = replace(case, label=label) if label.exists() else case
    return found


def _dimensions(source: Source) -> int | None:
    """Return how many axes the images have, without those of length 1; None where no header tells it.

    A volume may have a single slice, so the first image that has three axes decides.
    """
    found = None
    for case in source.dataset.cases.values():
        axes = _axes(case.images[0])
        if axes is not None:
            found = max(axes, found or 0)
        if found == _MOST_AXES:
            break
    return found


def _axes(image: Path) -> int | None:
    header = sitk.ImageFileReader()
    header.SetFileName(str(image))
    try:
        header.ReadImageInformation()
    except RuntimeError:  # the integrity check will name a damaged file
        return None
    return sum(length > 1 for length in header.GetSize()[:_MOST_AXES])


def _misplaced(index: int, names: Sequence[str], places: Sequence[Mapping[str, set[int]]]) -> list[Problem]:
    """Return a problem if datasets have a channel in different places, which no name for it makes right.

    A name that one dataset has in both places tells nothing of the order, as "zscore" of each channel.

    Args:
        index: the channel.
        names: what the datasets call it.
        places: `_places` of each dataset.
    """
    names = _one_spelling(names)
    if not any(_lies_elsewhere(index, name.casefold(), places) for name in names):
        return []
    problem = f"channel {index} is {' or '.join(names)}, and one of them is another channel elsewhere"
    return [Problem("dataset.json", problem, "bring the channels of all datasets into one order")]


def _lies_elsewhere(index: int, name: str, places: Sequence[Mapping[str, set[int]]]) -> bool:
    """Whether one dataset has a name at this channel, and another one not here but where the first does not have it."""
    found = [by_name[name] for by_name in places if name in by_name]
    here = [mine for mine in found if index in mine]
    return any(theirs - mine for theirs in found if index not in theirs for mine in here)


def _places(channels: Mapping[str, str]) -> dict[str, set[int]]:
    """Return the channels that bear each name, whatever its capitals."""
    places: dict[str, set[int]] = {}
    for index, name in channels.items():
        places.setdefault(str(name).casefold(), set()).add(int(index))
    return places


def _channel_problems(index: int, found: Sequence[Sequence[str]]) -> list[Problem]:
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    names = _one_spelling(found[index])
    if len({get_normalization_scheme(name) for name in names}) > 1:
        joined = " or ".join(names)
        problem = f"channel {index} is {joined}, which nnU-Net normalises in different ways, but a dataset in one"
        remedy = f'add --channel_names "{joined}", by which each image is normalised by itself (z-score)'
        return [Problem("dataset.json", problem, remedy)]
    return _lies(" or ".join(names), names, "dataset.json")


def _one_spelling(names: Sequence[str]) -> list[str]:
    """Return names without those that differ in capitals alone, which is the same to nnU-Net."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(name.casefold(), name)
    return list(first.values())


def _lies(name: str, found: Sequence[str], file: str) -> list[Problem]:
    """Return a problem if a name says of all images what is true of some: prompts and normalisation go by it."""
    modalities = {modality_of(own) for own in found}
    if modality_of(name) == OTHER or modalities in ({OTHER}, {modality_of(name)}):
        return []
    joined = " or ".join(_one_spelling(found))
    example = joined if modality_of(joined) == OTHER else "zscore"
    remedy = f'choose a name that fits all of them, such as --channel_names "{example}"'
    return [Problem(file, f"the channel name {name!r} is not true of all images, which are {joined}", remedy)]


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in values.items())
