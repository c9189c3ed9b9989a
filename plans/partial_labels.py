"""Partially labelled data: which classes a case annotates, as dataset.json says in `annotated` and `groups`.

    "annotated": {"siteA": ["liver"], "case_0042": ["spleen", "liver"]},
    "groups":    {"siteA": ["case_0001", "siteA_*"]}

A key of `annotated` is a case or a group; a case that is named itself needs no group. Everything else is annotated
completely. A group that is not in `annotated` says nothing of classes; the evaluation takes it as well.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lgssl_nnunet.data.partial_labels import PartialLabel, class_values, foreground_classes
from lgssl_nnunet.problems import Problem, first_of

if TYPE_CHECKING:
    from lgssl_nnunet.plans.cases import RawDataset

_WILDCARDS = frozenset("*?[")
_SHOWN = 5


def partial_labels(dataset: RawDataset) -> dict[str, tuple[str, ...]]:
    """Return the annotated classes of those labelled cases that annotate only some.

    None of a dataset with problems, which may lie in what it says of its annotation and are told first.
    """
    return {} if dataset.problems else annotated_classes(dataset.dataset_json, dataset.labeled)


def label_readings(dataset: RawDataset) -> dict[str, PartialLabel]:
    """Return how the labels of the partially annotated cases are read, by case."""
    labels = dataset.dataset_json["labels"]
    return {name: PartialLabel.of(labels, classes) for name, classes in partial_labels(dataset).items()}


def annotated_classes(dataset_json: Mapping[str, Any], cases: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return by case the classes that it annotates, in the order of `labels`, for cases that annotate only some.

    Args:
        dataset_json: its `annotated` and `groups` must have none of the `annotation_problems`.
        cases: identifiers.
    """
    annotated = dataset_json.get("annotated")
    if not annotated:
        return {}
    names = foreground_classes(dataset_json["labels"])
    found = named_cases(annotated, dataset_json.get("groups", {}), set(cases))
    ordered = {case: tuple(name for name in names if name in found[case]) for case in sorted(found)}
    return {case: classes for case, classes in ordered.items() if len(classes) < len(names)}


def named_cases(
    annotated: Mapping[str, list[str]], groups: Mapping[str, list[str]], cases: set[str]
) -> dict[str, list[str]]:
    """Return what `annotated` says of those cases that are a key of it, or in a group that is one.

    Args:
        annotated: of dataset.json; it must have none of the `form_problems`.
        groups: of dataset.json, likewise.
        cases: identifiers.
    """
    found: dict[str, list[str]] = {}
    for key, members in groups.items():
        if key in annotated:
            found.update(dict.fromkeys(members_there(members, cases), annotated[key]))
    return found | {case: classes for case, classes in annotated.items() if case in cases}


def missing_classes(labels: Mapping[str, Any], partial: Mapping[str, Iterable[str]], cases: Iterable[str]) -> list[str]:
    """Return the classes that none of the labelled cases annotates.

    Args:
        labels: of dataset.json.
        partial: annotated classes of the partially annotated cases.
        cases: the labelled cases in question.
    """
    names = foreground_classes(labels)
    values = {name: class_values(labels[name]) for name in names}
    seen = {values[name] for case in cases for name in partial.get(case, names)}
    return [name for name in names if values[name] not in seen]


def annotation_problems(dataset_json: Mapping[str, Any], cases: Iterable[str] | None = None) -> list[Problem]:
    """Return everything that is wrong with `annotated` and `groups`.

    Args:
        dataset_json: with labels that have been checked.
        cases: identifiers of all cases, labelled, unlabelled and test; None where they are not known.
    """
    if "annotated" not in dataset_json:
        return []
    annotated, groups = dataset_json["annotated"], dataset_json.get("groups", {})
    problems = form_problems({"annotated": annotated, "groups": groups})
    if problems:
        return problems
    names = foreground_classes(dataset_json["labels"])
    for key, classes in annotated.items():
        problems += _class_problems(key, classes, names)
    return problems if cases is None else problems + _case_problems(annotated, groups, set(cases))


def form_problems(entries: Mapping[str, Any]) -> list[Problem]:
    """Return which entries of dataset.json, given by their key, do not list texts by name."""
    return [
        Problem("dataset.json", f"{key!r} is not an object that gives a list of texts for each name", "correct it")
        for key, entry in entries.items()
        if not _is_lists_by_name(entry)
    ]


def _case_problems(annotated: Mapping[str, Any], groups: Mapping[str, list[str]], there: set[str]) -> list[Problem]:
    problems = []
    for key in annotated:
        if key not in there and key not in groups:
            problems.append(_problem("annotated", key, "is neither a case nor a group", "correct the name"))
    for name, members in groups.items():
        problems += _group_problems(name, members, there)
    return problems + double_problems(annotated, groups, there)


def _class_problems(key: str, classes: list[str], names: list[str]) -> list[Problem]:
    if not classes:
        remedy = "name its classes, or leave its label file out of labelsTr"
        return [_problem("annotated", key, "names no class", remedy)]
    unknown = [name for name in classes if name not in names]
    if not unknown:
        return []
    remedy = f"choose among {', '.join(names)}"
    return [_problem("annotated", key, f"names {', '.join(unknown)}, which is no class of labels", remedy)]


def _group_problems(name: str, members: list[str], cases: set[str]) -> list[Problem]:
    problems = []
    if name in cases:
        problems.append(_problem("groups", name, "is also the name of a case", "give the group another name"))
    if not members:
        problems.append(_problem("groups", name, "has no case", "list identifiers or patterns such as siteA_*"))
    without = [member for member in members if not members_there([member], cases)]
    if without:
        problem = f"has no case {first_of(without, _SHOWN)}"
        problems.append(_problem("groups", name, problem, "correct the name or remove it"))
    return problems


def double_problems(annotated: Mapping[str, Any], groups: Mapping[str, list[str]], cases: set[str]) -> list[Problem]:
    """Return the cases that two annotated groups claim, unless they are named themselves.

    Args:
        annotated: of dataset.json; it must have none of the `form_problems`.
        groups: of dataset.json, likewise.
        cases: identifiers.
    """
    of: dict[str, list[str]] = {}
    for name in groups:
        if name in annotated:
            for case in members_there(groups[name], cases):
                of.setdefault(case, []).append(name)
    remedy = "name the case itself in 'annotated', or take it out of all but one"
    return [
        Problem(f"dataset.json, case {case}", f"is in the groups {', '.join(found)}", remedy)
        for case, found in sorted(of.items())
        if len(found) > 1 and case not in annotated
    ]


def members_there(members: Iterable[str], cases: set[str]) -> set[str]:
    """Return those of the cases that a group names.

    Args:
        members: identifiers and shell patterns.
        cases: identifiers.
    """
    found = cases.intersection(members)
    for pattern in members:
        if _WILDCARDS.intersection(pattern):
            found.update(case for case in cases if fnmatch.fnmatchcase(case, pattern))
    return found


def _is_lists_by_name(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(listed, list) and all(isinstance(name, str) for name in listed) for listed in entry.values()
    )


def _problem(key: str, name: str, problem: str, remedy: str) -> Problem:
    return Problem(f"dataset.json, {key} {name}", problem, remedy)
