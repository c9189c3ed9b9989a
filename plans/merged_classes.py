"""The classes of a merged dataset: the union, in which one structure under several names is one class.

Two classes are one if a user says so (`same`), or if their texts name one structure: equal words, or names of one
structure in the bank's table of synonyms. The text of a class is its prompt where it has one, else its name, so that
the "tumour" of two datasets whose prompts are "liver tumour" and "kidney tumour" stays two classes. Sentences are
compared as a whole.
"""

from __future__ import annotations

import difflib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lgssl_nnunet.paths import dataset_number, is_dataset
from lgssl_nnunet.plans.sidedness import sided_pairs
from lgssl_nnunet.problems import Problem
from lgssl_nnunet.text.bank import normalise, structure_of, without_article
from lgssl_nnunet.text.prompts import CT, MRI, build_prompts, modality_of, phrase_of

logger = logging.getLogger(__name__)

_RESERVED = ("background", "ignore")
_LOOKS_ALIKE = 0.85
"""Of difflib's ratio; "gallbladder" and "galbladder" have 0.95, "left kidney" and "right kidney" 0.78."""


@dataclass(frozen=True)
class SourceClass:
    """A class of one of the datasets that are merged.

    Attributes:
        dataset: name of the dataset's folder.
        name: in its dataset.json.
        value: of its voxels.
        text: the phrase that says what it is, without an article, or the sentences of a prompt that has none.
        prompt: what its dataset.json has as its prompt; None for none.
        has_phrase: the text is a phrase, which can be a name.
    """

    dataset: str
    name: str
    value: int
    text: str
    prompt: str | Sequence[str] | None = field(default=None, compare=False)
    has_phrase: bool = True

    @property
    def identity(self) -> str:
        """What is equal for classes of one structure."""
        return structure_of(self.text) or normalise(self.text)

    def __str__(self) -> str:
        return f"{self.dataset} {self.name!r} ({self.value})"


@dataclass(frozen=True)
class MergedClass:
    """A class of the merged dataset.

    Attributes:
        name: in the merged dataset.json.
        members: the classes that it is made of, in the order of the datasets.
        reason: why they are one; empty for a single one.
    """

    name: str
    members: tuple[SourceClass, ...]
    reason: str = ""

    @property
    def datasets(self) -> set[str]:
        """The datasets that annotate it."""
        return {member.dataset for member in self.members}


@dataclass(frozen=True)
class _Chain:
    """Classes that a user joins, and what the class is called."""

    name: str
    members: tuple[SourceClass, ...]


def classes_of(dataset: str, dataset_json: Mapping[str, Any]) -> list[SourceClass]:
    """Return the foreground classes of a dataset by ascending value; it has no regions.

    Args:
        dataset: name of its folder.
        dataset_json: its content.

    Raises:
        PromptError: dataset.json has impossible prompts, or two names for one value.
    """
    found = []
    for prompt in build_prompts(dataset_json):
        name = prompt.class_name
        value = label_value(dataset_json["labels"][name])
        if value > 0:
            phrases = [text.phrase or phrase_of(text.sentence) for text in prompt.texts]
            phrase = next(filter(None, phrases), None)
            text = without_article(phrase) if phrase else " ".join(text.sentence for text in prompt.texts)
            own = (dataset_json.get("prompts") or {}).get(name)
            found.append(SourceClass(dataset, name, value, text, own, phrase is not None))
    return found


def label_value(value: int | Sequence[int]) -> int:
    """Return the value of a class, which nnU-Net also takes as a list of one."""
    return value if isinstance(value, int) else value[0]


def merge_classes(
    classes: Sequence[SourceClass], same: Sequence[Sequence[str]] = (), keep_apart: Sequence[str] = ()
) -> tuple[list[MergedClass], list[Problem]]:
    """Return the classes of the merged dataset in the order in which they first appear, and what is wrong.

    Args:
        classes: those of all datasets.
        same: groups of classes that are one, by name or as `DATASET:NAME`; the first name is that of the class.
        keep_apart: classes that are one with no other, by name or as `DATASET:NAME`.
    """
    chains, problems = _chains(classes, same)
    apart, more = _named(classes, keep_apart, "--keep_apart")
    problems += more
    for member in sorted(set(apart) & _joined(chains), key=str):
        problems.append(Problem(str(member), "is named by --same and by --keep_apart", "name it in one of the two"))
    groups = _groups(classes, chains, apart)
    problems += [problem for group in groups for problem in _joined_within_a_dataset(group, chains)]
    names = _names(groups, chains)
    for name in sorted({name for name in names if names.count(name) > 1 or name in _RESERVED}):
        problem = f"would have several classes called {name!r}, or a class with a name of nnU-Net's own"
        problems.append(Problem("dataset.json", problem, 'give another name with --same "NAME=CLASS=CLASS"'))
    merged = [
        MergedClass(name, tuple(group), _reason(group, chains)) for name, group in zip(names, groups, strict=True)
    ]
    return merged, problems


def merged_prompts(merged: Sequence[MergedClass], *, mixed: bool) -> dict[str, Any]:
    """Return the `prompts` block of the merged dataset.

    Args:
        merged: the classes.
        mixed: the images are of several modalities. A sentence in one of the templates is then taken back to its
            phrase, because the modality that it tells is wrong for some of the images; one that tells a modality in
            other words is kept, with a warning.
    """
    prompts = {}
    for entry in merged:
        prompt = _prompt(entry)
        if prompt is not None:
            prompts[entry.name] = _without_modality(entry.name, prompt) if mixed else prompt
    return prompts


def look_alike(merged: Sequence[MergedClass]) -> Iterator[tuple[MergedClass, MergedClass]]:
    """Yield pairs of classes that no dataset has both of, and whose texts are nearly the same or contain each other.

    A sentence is not like the phrase of the same structure, so that with one in a pair equal names are enough.
    """
    for first, second in itertools.combinations(merged, 2):
        one, other = first.members[0], second.members[0]
        words = _words(first), _words(second)
        similar = difflib.SequenceMatcher(None, one.identity, other.identity).ratio() > _LOOKS_ALIKE
        similar |= normalise(one.name) == normalise(other.name) and not (one.has_phrase and other.has_phrase)
        if not first.datasets & second.datasets and (similar or words[0] <= words[1] or words[1] <= words[0]):
            yield first, second


def parts_left_out(merged: Sequence[MergedClass]) -> Iterator[tuple[str, MergedClass, MergedClass]]:
    """Yield dataset, class and part of it where the dataset has the class alone and another one has both.

    What is a part is told by the words: "liver tumour" is one of "liver".
    """
    for whole, part in itertools.permutations(merged, 2):
        if whole.datasets & part.datasets and _words(whole) < _words(part):
            yield from ((dataset, whole, part) for dataset in sorted(whole.datasets - part.datasets))


def parts_joined(merged: Sequence[MergedClass]) -> Iterator[tuple[str, MergedClass, list[SourceClass]]]:
    """Yield dataset, class and what it has of it, where that may be a part of what other datasets have.

    So it is where another dataset had two or more classes joined, and this one has some of them only, or where the
    words tell it: "left kidney" beside "right kidney" or "kidney". A dataset that has none of the classes that another
    one joined is left out: "kidney" is all of "left kidney" and "right kidney".
    """
    for entry in merged:
        own = {name: [member for member in entry.members if member.dataset == name] for name in sorted(entry.datasets)}
        joined = {member.identity for members in own.values() if len(members) > 1 for member in members}
        for dataset, members in own.items():
            mine = {member.identity for member in members}
            others = {member.identity for member in entry.members} - mine
            by_words = len(members) == 1 and any(_is_part(members[0].identity, other) for other in others)
            if 0 < len(joined & mine) < len(joined) or by_words:
                yield dataset, entry, members


def _is_part(identity: str, other: str) -> bool:
    """Whether the words tell the other side of one structure, or a part of the other one."""
    return bool(sided_pairs([identity, other])) or set(other.split()) < set(identity.split())


def _words(entry: MergedClass) -> set[str]:
    return set(entry.members[0].identity.split())


def _chains(classes: Sequence[SourceClass], same: Sequence[Sequence[str]]) -> tuple[list[_Chain], list[Problem]]:
    """Return the groups of `same`, and what is wrong with them."""
    chains: list[_Chain] = []
    problems = []
    for names in same:
        shown = "--same " + "=".join(names)
        first, no_class = _named(classes, names[:1], shown)
        others, missing = _named(classes, names[1:], shown)
        # The first may be a new name, but not one of a dataset; of the others each is a class.
        missing += no_class if _begins_with_a_dataset(names[0]) else []
        members = tuple(dict.fromkeys([*first, *others]))
        problems += missing
        if not missing and len(members) < 2:
            problem = f"joins {'one class only' if members else 'no class'}"
            problems.append(Problem(shown, problem, f"name two or more of {_listed(classes)}"))
        twice = sorted(set(members) & _joined(chains), key=str)
        problems += [Problem(shown, f"names {member}, as another --same does", "join all in one") for member in twice]
        name = _without_dataset(names[0], classes)
        if normalise(name) in {normalise(chain.name) for chain in chains}:
            remedy = "join all in one, or begin it with another name"
            problems.append(Problem(shown, f"makes a class {name!r}, as another --same does", remedy))
        chains.append(_Chain(name, members))
    return chains, problems


def _joined(chains: Iterable[_Chain]) -> set[SourceClass]:
    return {member for chain in chains for member in chain.members}


def _named(classes: Sequence[SourceClass], names: Iterable[str], shown: str) -> tuple[list[SourceClass], list[Problem]]:
    """Return the classes that are meant by names, and a problem for each name that means none."""
    found, problems = [], []
    for name in names:
        members = [member for member in classes if _means(name, member)]
        found += members
        if not members:
            remedy = f"name a class of these: {_listed(classes)}"
            problems.append(Problem(shown, f"no dataset has a class {name!r}", remedy))
    return found, problems


def _means(name: str, member: SourceClass) -> bool:
    dataset, separator, alone = name.partition(":")
    if separator and is_dataset(member.dataset, dataset):
        return normalise(alone) == normalise(member.name)
    return normalise(name) == normalise(member.name)


def _begins_with_a_dataset(name: str) -> bool:
    dataset, separator, _ = name.partition(":")
    return bool(separator) and (dataset.isdecimal() or dataset_number(dataset) is not None)


def _without_dataset(name: str, classes: Sequence[SourceClass]) -> str:
    dataset, separator, alone = name.partition(":")
    qualified = separator and any(is_dataset(member.dataset, dataset) for member in classes)
    return alone if qualified else name


def _groups(
    classes: Sequence[SourceClass], chains: Sequence[_Chain], apart: Sequence[SourceClass]
) -> list[list[SourceClass]]:
    """Return the classes grouped by structure: what is linked by a group of `same` or by the text is one."""
    group_of: dict[SourceClass, list[SourceClass]] = {member: [member] for member in classes}
    by_text: dict[str, list[SourceClass]] = {}
    for member in classes:
        if member not in apart:
            by_text.setdefault(member.identity, []).append(member)
    for linked in (*(chain.members for chain in chains), *by_text.values()):
        for member in linked[1:]:
            first, second = group_of[linked[0]], group_of[member]
            if first is not second:
                first += second
                group_of.update(dict.fromkeys(second, first))
    order = {member: position for position, member in enumerate(classes)}
    unique = {id(group): sorted(group, key=order.__getitem__) for group in group_of.values()}
    return sorted(unique.values(), key=lambda group: order[group[0]])


def _joined_within_a_dataset(group: Sequence[SourceClass], chains: Sequence[_Chain]) -> Iterator[Problem]:
    """Yield a problem where two classes of one dataset became one and nobody said so."""
    for first, second in itertools.combinations(group, 2):
        said = any({first, second} <= set(chain.members) for chain in chains)
        if first.dataset == second.dataset and not said:
            remedy = f'say so with --same "{first.name}={second.name}", or keep one out of it with --keep_apart'
            problem = f"has the classes {first.name!r} and {second.name!r}, which are the same structure by their names"
            yield Problem(first.dataset, problem, remedy)


def _names(groups: Sequence[Sequence[SourceClass]], chains: Sequence[_Chain]) -> list[str]:
    """Return a name for each group; groups that would have one name are told apart by phrase, then by dataset."""
    names = [_said_name(group, chains) or group[0].name for group in groups]
    for wording in (
        lambda member: member.text if member.has_phrase else member.name,
        lambda member: f"{member.name} ({member.dataset})",
    ):
        repeated = {name for name in names if names.count(name) > 1 or name in _RESERVED}
        names = [wording(group[0]) if name in repeated else name for name, group in zip(names, groups, strict=True)]
    return names


def _said_name(group: Sequence[SourceClass], chains: Sequence[_Chain]) -> str | None:
    return next((chain.name for chain in chains if set(chain.members) & set(group)), None)


def _reason(group: Sequence[SourceClass], chains: Sequence[_Chain]) -> str:
    if len(group) == 1:
        return ""
    if _said_name(group, chains) is not None:
        return "by --same"
    same_words = len({normalise(member.text) for member in group}) == 1
    return "same words" if same_words else "by the table of synonyms"


def _prompt(entry: MergedClass) -> Any:
    """Return the prompt of a class: its own, or one that says what its name does not; None where the name does."""
    own = [member.prompt for member in entry.members if member.name == entry.name and member.prompt is not None]
    if own:
        return own[0]
    if structure_of(entry.name.replace("_", " ")) is not None:
        return None
    given = [member.prompt for member in entry.members if member.prompt is not None]
    if given:
        return given[0]
    known = [structure_of(member.text) for member in entry.members if structure_of(member.text)]
    if known:
        return known[0]
    return None if entry.name in {member.name for member in entry.members} else entry.members[0].text


def _without_modality(name: str, prompt: str | Sequence[str]) -> str | list[str]:
    if not isinstance(prompt, str):
        return [_without_modality(name, text) for text in prompt]
    phrase = phrase_of(prompt)
    if phrase is not None:
        return without_article(phrase)
    if modality_of(prompt) in (CT, MRI):
        logger.warning(
            "The prompt of %r tells one modality, and the images are of several: %r. Word it otherwise in dataset.json "
            "or with --prompts FILE.",
            name,
            prompt,
        )
    return prompt


def _listed(classes: Sequence[SourceClass]) -> str:
    return ", ".join(map(str, classes))
