"""The tables of a report, made from results whatever their columns are."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from lgssl_nnunet.evaluation.metrics import ClassResult

_ABBREVIATIONS = {"dice": "Dice", "hd95": "HD95", "assd": "ASSD", "asd": "ASD", "medpy": "(MedPy)", "n": "voxels in"}
_MILLIMETRES = {"hd95", "assd", "hd95_medpy", "asd_medpy"}
_ATTRIBUTE = re.compile(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """One cell: what is shown, and the number or text it sorts by (None goes to the end)."""

    text: str
    key: float | str | None
    is_number: bool


@dataclass(frozen=True)
class Table:
    """Rows under headings; `meanings` explains the columns that have an explanation, by heading."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    meanings: dict[str, str]


def results_table(results: Sequence[Any]) -> Table:
    """Return dataclass objects as a table: a column per field, without fields that are None everywhere.

    Args:
        results: objects of one dataclass, for example `ClassResult` or `ClassMean`.
    """
    if not results:
        return Table((), (), {})
    names = [f.name for f in fields(results[0]) if any(getattr(result, f.name) is not None for result in results)]
    explained = _explanations(type(results[0])) or _explanations(ClassResult)
    headings = {name: heading(name) for name in names}
    rows = tuple(tuple(_cell(getattr(result, name)) for name in names) for result in results)
    return Table(tuple(headings.values()), rows, {headings[n]: explained[n] for n in names if n in explained})


def heading(name: str) -> str:
    """Return a column's heading: hd95_medpy becomes "HD95 (MedPy) [mm]"."""
    words = [_ABBREVIATIONS.get(word, word) for word in name.split("_")]
    text = " ".join(words)
    return text[0].upper() + text[1:] + (" [mm]" if name in _MILLIMETRES else "")


def _cell(value: Any) -> Cell:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell("-", None, True)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Cell(str(value), str(value), False)
    return Cell(f"{value:.4f}" if isinstance(value, float) else str(value), float(value), True)


def _explanations(kind: type) -> dict[str, str]:
    """Return what the docstring of a dataclass says of its attributes, so that it is written in one place."""
    text = inspect.getdoc(kind) or ""
    attributes = text.partition("Attributes:\n")[2]
    return {name: " ".join(meaning.split()) for name, meaning in _ATTRIBUTE.findall(attributes)}


def rank_cases(results: Sequence[ClassResult]) -> list[str]:
    """Return the cases from the worst to the best mean Dice over the classes that were measured in them.

    Cases in which nothing can be measured (every class is absent in both masks) are left out.
    """
    values: dict[str, list[float]] = {}
    for result in results:
        if not math.isnan(result.dice):
            values.setdefault(result.case, []).append(result.dice)
    return sorted(values, key=lambda case: (math.fsum(values[case]) / len(values[case]), case))


def worst_and_best(ranked: Sequence[str], number: int) -> dict[str, str]:
    """Return why a case is shown, by case: the worst half of `number`, then the best half, none of them twice."""
    number = min(number, len(ranked))
    worst = list(ranked[: (number + 1) // 2])
    best = list(ranked[::-1][: number - len(worst)])
    return {case: f"worst {i + 1}" for i, case in enumerate(worst)} | {
        case: f"best {i + 1}" for i, case in enumerate(best)
    }
