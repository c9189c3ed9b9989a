"""What dataset.json declares, checked before anything relies on it."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.files import read_json
from lgssl_nnunet.problems import Problem, raise_if_any

logger = logging.getLogger(__name__)

MEANT_KEYS = {"channel_names", "labels", "file_ending", "regions_class_order", "prompts", "annotated", "groups"}
"""Keys that change what planning does; a misspelt one is named."""
_LIKE = 0.8
REQUIRED_KEYS = {"channel_names": dict, "labels": dict, "file_ending": str}


def load_dataset_json(folder: Path) -> dict[str, Any]:
    """Read the dataset.json of a raw dataset.

    Raises:
        DatasetError: it is missing or no JSON, lacks a key or declares impossible labels; all problems are listed.
    """
    content = read_json(folder / "dataset.json")
    if not isinstance(content, dict):
        raise DatasetError(f"{folder / 'dataset.json'}: must hold one JSON object; see nnU-Net's dataset format.")
    wrong = _key_problems(content)
    problems = list(wrong.values())
    if "channel_names" not in wrong:
        problems += _channel_problems(content["channel_names"])
    if "labels" not in wrong:
        problems += label_problems(content)
    raise_if_any(problems, folder.name)
    _warn_about_keys(content)
    return content


def _warn_about_keys(content: Mapping[str, Any]) -> None:
    """Name keys that are probably misspelt, since what is optional would be left out without a word."""
    for key in sorted(content.keys() - set(MEANT_KEYS)):
        for meant in difflib.get_close_matches(key, MEANT_KEYS - content.keys(), n=1, cutoff=_LIKE):
            logger.warning("dataset.json: the key %r means nothing; is %r meant?", key, meant)
    if "groups" in content and "annotated" not in content:
        logger.warning(
            "dataset.json has 'groups' but no 'annotated': every labelled case counts as annotated in all classes."
        )


def label_values(labels: Mapping[str, Any]) -> list[int]:
    """Return every value that a label file may hold, the ignore label included."""
    values: set[int] = set()
    for value in labels.values():
        values.update(value if isinstance(value, (list, tuple)) else [value])
    return sorted(values)


def label_problems(dataset_json: Mapping[str, Any]) -> list[Problem]:
    """Return what is wrong with the declared labels and regions."""
    labels = dataset_json["labels"]
    wrong = [name for name, value in labels.items() if not _is_label(value)]
    if wrong:
        remedy = "give whole numbers, or lists of them for regions"
        return [Problem("dataset.json", f"the values of labels {', '.join(wrong)} are no numbers", remedy)]
    problems = []
    if labels.get("background") != 0:
        problems.append(Problem("dataset.json", "labels has no 'background' with value 0", 'add "background": 0'))
    values = label_values(labels)
    if values != list(range(len(values))):
        remedy = "use 0, 1, 2, ... without gaps and change the label files accordingly"
        problems.append(Problem("dataset.json", f"label values {values} are not consecutive", remedy))
    elif len(values) < 2:
        problems.append(Problem("dataset.json", "labels has no foreground class", "add at least one"))
    if "ignore" in labels and labels["ignore"] != max(values):
        problem = f"the ignore label {labels['ignore']} is not the highest value"
        problems.append(Problem("dataset.json", problem, "give it the highest value"))
    return problems + _region_problems(dataset_json)


def _region_problems(dataset_json: Mapping[str, Any]) -> list[Problem]:
    labels = dataset_json["labels"]
    if not any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values()):
        return []
    regions = [name for name, value in labels.items() if name != "ignore" and value not in (0, [0])]
    order = dataset_json.get("regions_class_order")
    if isinstance(order, list) and len(order) == len(regions):
        return []
    remedy = f"list {len(regions)} values, one per region, in the order of painting"
    return [Problem("dataset.json", "has regions without a fitting 'regions_class_order'", remedy)]


def _channel_problems(channel_names: Mapping[str, Any]) -> list[Problem]:
    expected = [str(channel) for channel in range(len(channel_names))]
    if channel_names and sorted(channel_names, key=str) == sorted(expected):
        return []
    remedy = 'number the channels "0", "1", ...'
    return [Problem("dataset.json", f"channel_names has the keys {list(channel_names)}", remedy)]


def _key_problems(dataset_json: Mapping[str, Any]) -> dict[str, Problem]:
    """Return what is wrong with the required entries, by key."""
    problems = {}
    for key, kind in REQUIRED_KEYS.items():
        if key not in dataset_json:
            old_name = ["modality"] if key == "channel_names" and "modality" in dataset_json else []
            like = old_name or difflib.get_close_matches(key, dataset_json.keys() - set(MEANT_KEYS), n=1, cutoff=_LIKE)
            remedy = f"rename {like[0]!r} to it" if like else "add it"
            problems[key] = Problem("dataset.json", f"has no {key!r}", remedy)
        elif not isinstance(dataset_json[key], kind) or not dataset_json[key]:
            shape = "a text such as .nii.gz" if kind is str else "an object with at least one entry"
            problems[key] = Problem("dataset.json", f"{key!r} is not {shape}", "correct it")
    if not isinstance(dataset_json.get("dataset", {}), dict):
        problems["dataset"] = Problem("dataset.json", "'dataset' is no object with cases", "correct it or leave it out")
    return problems


def _is_label(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return bool(values) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
