"""The text of each output channel: from the channel and class names of dataset.json, or as the user words it.

The rules, in one place:

- Channels. Without regions: background, then every foreground label by ascending value. With regions: the foreground
  regions in the order of dataset.json, no background. The ignore label never has a prompt. This is the order of the
  channels of nnU-Net's network.
- Modality. All channels CT: "A computerized tomography of a liver" (`an` before a vowel sound). All channels MRI, by
  whichever sequence name (T1, T2, FLAIR, LGE, ...): "A magnetic resonance image of the left atrium". Anything else,
  a mixture included: "A medical image of the ...". Background is worded like every other class.
- Names. Underscores become spaces and capitalised words lower case ("Left_Atrium" is "left atrium", "MS_lesion" is
  "MS lesion").
- Override. A value that ends with a full stop, or begins with a capital "A ", "An " or "The ", is a whole sentence or
  description and is used as it stands. Any other value is a phrase and goes into the template in place of the class
  name; a phrase that brings its own article ("the left lung") keeps it. A list of such values gives a class several
  texts, whose vectors are averaged.
- Ensembling, on request. Every phrase is worded in all templates of its modality, and the vectors are averaged; whole
  sentences have no template and stay one text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import PromptError
from lgssl_nnunet.files import parse_json

CT = "CT"
MRI = "MRI"
OTHER = "other"
MODALITIES = (CT, MRI, OTHER)

_TEMPLATES = {
    CT: (
        "A computerized tomography of {}",
        "A CT scan showing {}",
        "CT imaging of {}",
        "A slice through {} in computed tomography",
        "The outline of {} in a CT volume",
    ),
    MRI: (
        "A magnetic resonance image of {}",
        "An MRI scan showing {}",
        "MR imaging of {}",
        "A slice through {} in magnetic resonance imaging",
        "The outline of {} in an MR volume",
    ),
    OTHER: (
        "A medical image of {}",
        "A scan showing {}",
        "Medical imaging of {}",
        "A slice through {} in medical imaging",
        "The outline of {} in a medical volume",
    ),
}
"""Templates by modality. The first one words a prompt; all of them together are the ensemble."""

_CHANNEL_WORDS = {
    CT: "ct cta cect ncct ldct cbct",
    MRI: "mr mri mra magnetic t1 t1w t1c t1ce t1gd t1n t1wi t2 t2w t2f t2s t2star t2wi flair lge cine bssfp adc dwi "
    "dti swi dce dsc pd pdw gre mprage haste dixon vibe stir",
    OTHER: "pet spect us ultrasound xray",
}
_OWN_ARTICLE = re.compile(r"(a|an|the)\s")
_INITIALS_WITH_VOWEL_SOUND = "AEFHILMNORSX"
_WORD_WITH_YOU_SOUND = re.compile(r"(uni|ure|uri|ute|use|eu)", re.IGNORECASE)


@dataclass(frozen=True)
class Prompt:
    """The text of one output channel.

    Attributes:
        class_name: Name in dataset.json.
        sentence: The sentence to embed.
        phrase: What stands in the template (class name or phrase of the user); None for a sentence given as a whole,
            which a look-up must then find word by word.
        modality: `CT`, `MRI` or `other`: the template of `sentence`.
        rewordings: The phrase in the further templates of the modality, if the prompt is an ensemble.
        others: Further texts of the same class, which have no `others` of their own.
    """

    class_name: str
    sentence: str
    phrase: str | None = None
    modality: str = OTHER
    rewordings: tuple[str, ...] = ()
    others: tuple[Prompt, ...] = ()

    @property
    def texts(self) -> tuple[Prompt, ...]:
        """All texts of the class, this one first; their vectors are averaged."""
        return (self, *self.others)


def build_prompts(
    dataset_json: Mapping[str, Any],
    overrides: Mapping[str, str | Sequence[str]] | None = None,
    *,
    ensemble: bool = False,
) -> list[Prompt]:
    """Word the prompt of every output channel, in the order of the network's channels.

    Args:
        dataset_json: Content of dataset.json; its `prompts` block, if any, overrides the templates.
        overrides: Prompt, or several, by class name (`--prompts FILE`); wins over the block in dataset.json.
        ensemble: Word every phrase in all templates of the modality, to be averaged.

    Returns:
        One prompt per output channel.

    Raises:
        PromptError: A prompt is given for a class without an output channel, or is not a text.

    Source:
        Template sentences of LG-SSL (2024), corrected for the modality: methods.md 2.4 and 2.7.
    """
    names = prompted_classes(dataset_json)
    modality = prompt_modality(dataset_json)
    wording = dict(_checked_overrides(dataset_json.get("prompts"), names, "the `prompts` block of dataset.json"))
    wording.update(_checked_overrides(overrides, names, "the prompt file"))
    return [_make_prompt(name, wording.get(name), modality, ensemble) for name in names]


def prompted_classes(dataset_json: Mapping[str, Any]) -> list[str]:
    """Return the class name of every output channel, in nnU-Net's channel order.

    Raises:
        PromptError: dataset.json has no labels, or two names share one label value.
    """
    labels = dataset_json.get("labels")
    if not isinstance(labels, Mapping) or not labels:
        raise PromptError('dataset.json has no `labels`: add, for example, "labels": {"background": 0, "liver": 1}.')
    classes = {name: _label_values(name, value) for name, value in labels.items() if name != "ignore"}
    if has_regions(dataset_json):
        return [name for name, values in classes.items() if set(values) != {0}]
    names = sorted(classes, key=lambda name: classes[name])
    for first, second in itertools.pairwise(names):
        if classes[first] == classes[second]:
            raise PromptError(
                f"dataset.json gives the label value {classes[first][0]} to both {first!r} and {second!r}: "
                "keep one name for each value."
            )
    return names


def has_regions(dataset_json: Mapping[str, Any]) -> bool:
    """Return whether classes are overlapping regions, as nnU-Net decides: some class has several values."""
    labels = dataset_json["labels"].items()
    return any(isinstance(value, list | tuple) and len(value) > 1 for name, value in labels if name != "ignore")


def prompt_modality(dataset_json: Mapping[str, Any]) -> str:
    """Tell from `channel_names` (or nnU-Net v1's `modality`) which template fits: `CT`, `MRI` or `other`."""
    channels = dataset_json.get("channel_names") or dataset_json.get("modality") or {}
    names = channels.values() if isinstance(channels, Mapping) else channels
    found = {modality_of(str(name)) for name in names}
    return found.pop() if len(found) == 1 else OTHER


def modality_of(text: str) -> str:
    """Return which modality the words of a channel name or sentence tell: `CT`, `MRI`, or `other` for none or several.

    Args:
        text: for example "T1w", or "An MRI scan showing the liver".
    """
    words = set(re.findall(r"[a-z0-9]+", text.lower()))
    found = [modality for modality, known in _CHANNEL_WORDS.items() if words & set(known.split())]
    if not found and words & {"computed", "computerized"} and "tomography" in words:
        found = [CT]
    return found[0] if len(found) == 1 else OTHER


def templates(modality: str) -> tuple[str, ...]:
    """Return the templates of a modality (`CT`, `MRI` or `other`); `{}` stands for the phrase with its article."""
    return _TEMPLATES[modality]


def template_sentence(phrase: str, modality: str) -> str:
    """Put a phrase into the template of a modality.

    Args:
        phrase: For example "left atrium" or "the left atrium".
        modality: `CT`, `MRI` or `other`.

    Returns:
        The sentence, without a full stop.
    """
    article = _indefinite_article(phrase) if modality == CT else "the"
    return templates(modality)[0].format(_with_article(phrase, article))


def phrase_of(sentence: str) -> str | None:
    """Return the phrase of a sentence that is worded in one of the templates, with its article; None for another one.

    Args:
        sentence: for example "A magnetic resonance image of the liver".
    """
    for before, after in (template.split("{}") for worded in _TEMPLATES.values() for template in worded):
        found = re.fullmatch(f"{re.escape(before)}(?P<phrase>.+){re.escape(after)}", sentence.strip().rstrip("."))
        if found:
            return found["phrase"]
    return None


def phrase_prompt(class_name: str, phrase: str, modality: str, *, ensemble: bool = False) -> Prompt:
    """Make the prompt of a phrase.

    Args:
        class_name: Name in dataset.json.
        phrase: For example "left atrium" or "the left atrium".
        modality: `CT`, `MRI` or `other`.
        ensemble: Add the phrase in the further templates of the modality, always with "the" if it has no article.

    Returns:
        The prompt.
    """
    further = templates(modality)[1:] if ensemble else ()
    rewordings = tuple(template.format(_with_article(phrase, "the")) for template in further)
    return Prompt(class_name, template_sentence(phrase, modality), phrase, modality, rewordings)


def load_prompt_file(path: str | Path) -> dict[str, str | list[str]]:
    """Read a JSON file that maps class names to prompts.

    Class names are checked by `build_prompts`, which knows the dataset.

    Args:
        path: JSON file such as `{"Anterior": "anterior part of the hippocampus", "liver": ["liver", "hepar"]}`.

    Returns:
        Prompt, or list of prompts, by class name.

    Raises:
        PromptError: The file is missing, is no JSON object, or holds something that is neither a text nor texts.
    """
    path = Path(path)
    remedy = 'it must hold one JSON object such as {"liver": "liver with tumours"}.'
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"Prompt file {path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise PromptError(f"Prompt file {path} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict) or not content:
        raise PromptError(f"Prompt file {path} does not map class names to prompts; {remedy}")
    for name, value in content.items():
        _check_prompt(name, value, f"Prompt file {path}")
    return content


def _make_prompt(class_name: str, wording: str | Sequence[str] | None, modality: str, ensemble: bool) -> Prompt:
    if wording is None:
        return phrase_prompt(class_name, _readable(class_name), modality, ensemble=ensemble)
    texts = [" ".join(text.split()) for text in _as_list(wording)]
    first, *others = (_worded_prompt(class_name, text, modality, ensemble) for text in texts)
    return replace(first, others=tuple(others))


def _worded_prompt(class_name: str, text: str, modality: str, ensemble: bool) -> Prompt:
    if _is_sentence(text):
        return Prompt(class_name, text, phrase=None, modality=modality)
    return phrase_prompt(class_name, text, modality, ensemble=ensemble)


def _as_list(wording: str | Sequence[str]) -> list[str]:
    return [wording] if isinstance(wording, str) else list(wording)


def _with_article(phrase: str, article: str) -> str:
    return phrase if _OWN_ARTICLE.match(phrase) else f"{article} {phrase}"


def _is_sentence(text: str) -> bool:
    return text.endswith(".") or text.startswith(("A ", "An ", "The "))


def _readable(class_name: str) -> str:
    words = class_name.replace("_", " ").split()
    return " ".join(word.lower() if len(word) > 1 and word.istitle() else word for word in words)


def _indefinite_article(phrase: str) -> str:
    word = re.split(r"[\s-]", phrase, maxsplit=1)[0]
    if word.isupper() and len(word) <= 3:
        return "an" if word[0] in _INITIALS_WITH_VOWEL_SOUND else "a"
    if _WORD_WITH_YOU_SOUND.match(word):
        return "a"
    return "an" if word[:1].lower() in ("a", "e", "i", "o", "u") else "a"


def _label_values(name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    try:
        return tuple(int(item) for item in values)
    except (TypeError, ValueError) as error:
        raise PromptError(
            f"dataset.json gives class {name!r} the label {value!r}: a label is an integer or a list of integers."
        ) from error


def _checked_overrides(overrides: Any, names: Sequence[str], origin: str) -> Mapping[str, str | Sequence[str]]:
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise PromptError(f"{origin[0].upper()}{origin[1:]} must map class names to prompts, as a JSON object.")
    unknown = [str(name) for name in overrides if name not in names]
    if unknown:
        raise PromptError(
            f"{origin[0].upper()}{origin[1:]} names {_listed(unknown)}, which no output channel has: "
            f"the classes here are {_listed(names)}."
        )
    for name, value in overrides.items():
        _check_prompt(name, value, f"{origin[0].upper()}{origin[1:]}")
    return overrides


def _check_prompt(name: str, value: Any, origin: str) -> None:
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts or not all(isinstance(text, str) and text.strip(" .") for text in texts):
        raise PromptError(
            f"{origin} gives class {name!r} the prompt {value!r}: a prompt is a phrase, a sentence or a list of them."
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
