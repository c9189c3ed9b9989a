"""Writes docs/trainers.md from the docstrings of the trainers: sources, deviations and every hyper-parameter.

Run it as `python docs/write_trainers.py` after changing one of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

from lgssl_nnunet.registry import find_trainer, trainer_names

PAGE = Path(__file__).with_name("trainers.md")
HEAD = """# Trainers

What `lgssl_train DATASET CONFIGURATION TRAINER` takes, and what `--set name=value` changes in each. Defaults are the
published values unless the text says otherwise. All trainers share planner, augmentation, schedule and optimiser; each
file in `trainers/` holds one method. Figures: [benchmarks/RESULTS.md](../benchmarks/RESULTS.md). A method of your own:
[adding_a_method.md](adding_a_method.md).

This page is made from the docstrings by `python docs/write_trainers.py`.
"""


def attribute_texts(owner: type) -> dict[str, str]:
    """Return the description of each field, from the section `Attributes:` of a Google-style docstring."""
    section = inspect.getdoc(owner).partition("Attributes:\n")[2]
    fields = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in fields}


def table(hyperparameters: object) -> str:
    """Return a table of names, defaults and meanings; a sentence if there are none."""
    texts = attribute_texts(type(hyperparameters))
    rows = [
        f"| `{field.name}` | `{shown(getattr(hyperparameters, field.name))}` | {texts[field.name]} |"
        for field in dataclasses.fields(hyperparameters)
    ]
    return "\n".join(["| name | default | meaning |", "| --- | --- | --- |", *rows]) if rows else "No hyper-parameters."


def shown(value: object) -> str:
    """Return a default as text, fractions to four digits."""
    return f"{value:.4g}" if isinstance(value, float) and value != round(value, 4) else str(value)


def description(name: str) -> str:
    """Return the section of one trainer, without references to what is not in this repository."""
    trainer = find_trainer(name)
    # A reference ends at a full stop that is not inside of a number.
    text = re.sub(r";\s+methods\.md.*?(?=\.\s|\.\Z|;)", "", inspect.getdoc(trainer), flags=re.DOTALL)
    return f"## {name}\n\n{text}\n\n{table(trainer.hyperparameters)}\n"


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *map(description, trainer_names())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
