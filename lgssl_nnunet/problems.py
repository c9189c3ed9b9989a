"""Problems found in a dataset, collected so that a person sees all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lgssl_nnunet.errors import DatasetError, LGSSLError

MAX_LISTED = 50


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a dataset.

    Attributes:
        file: file or folder concerned.
        problem: what is wrong with it.
        remedy: what to do about it.
    """

    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}; {self.remedy}."


def first_of(names: Sequence[str], most: int) -> str:
    """Return names in a sentence: at most so many of them, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def raise_if_any(problems: Iterable[Problem | LGSSLError], dataset_name: str) -> None:
    """Raise one error that lists the problems, one line each; an error's own list is indented.

    Raises:
        DatasetError: there is at least one problem; at most `MAX_LISTED` are listed, the rest is counted.
    """
    problems = list(problems)
    if not problems:
        return
    lines = [f"{dataset_name} has {len(problems)} problem{'s' if len(problems) > 1 else ''}:"]
    lines += [f"  {problem}".replace("\n", "\n  ") for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  ... and {len(problems) - MAX_LISTED} more.")
    raise DatasetError("\n".join(lines))
