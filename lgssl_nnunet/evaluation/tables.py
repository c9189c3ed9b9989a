"""Evaluation results as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lgssl_nnunet.evaluation.metrics import POLICY, ClassMean, foreground_mean

_HEADER = ("class", "label", "Dice", "Jaccard", "cases", "both empty", "one empty")


def class_table(means: Sequence[ClassMean]) -> str:
    """Return a table with one line per class, the mean over classes, and the empty-mask policy below it."""
    rows = [
        (m.name, m.key, _number(m.dice), _number(m.jaccard), str(m.cases), str(m.both_empty), str(m.one_empty))
        for m in means
    ]
    dice, jaccard = foreground_mean(means)
    rows.append(("mean", "", _number(dice), _number(jaccard), "", "", ""))
    widths = [max(len(row[column]) for row in (_HEADER, *rows)) for column in range(len(_HEADER))]
    lines = [_line(_HEADER, widths), "  ".join("-" * width for width in widths), *(_line(row, widths) for row in rows)]
    return "\n".join([*lines, "", POLICY])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    names = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
    numbers = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join(names + numbers).rstrip()


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
