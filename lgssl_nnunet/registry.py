"""Finds trainers by class name, without importing torch until one is asked for."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lgssl_nnunet.errors import UsageError

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

_PACKAGE = "lgssl_nnunet.trainers"


def trainer_modules() -> dict[str, str]:
    """Map each public trainer class of this package to the module that defines it, by reading the files only."""
    spec = importlib.util.find_spec(_PACKAGE)
    modules = {}
    for folder in spec.submodule_search_locations or ():
        for file in sorted(Path(folder).glob("*.py")):
            if file.stem in ("__init__", "base"):
                continue
            tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and node.name.endswith("Trainer") and not node.name.startswith("_"):
                    modules[node.name] = f"{_PACKAGE}.{file.stem}"
    return modules


def trainer_names() -> list[str]:
    """Return the names of this package's trainers in alphabetical order."""
    return sorted(trainer_modules())


def find_trainer(name: str) -> type[nnUNetTrainer]:
    """Return the trainer class of that name: ours first, then nnU-Net's own.

    Raises:
        UsageError: no such trainer; the message offers the nearest names.
    """
    modules = trainer_modules()
    if name in modules:
        return getattr(importlib.import_module(modules[name]), name)
    stock = _find_stock_trainer(name)
    if stock is None:
        known = {known.lower(): known for known in [*modules, "nnUNetTrainer"]}
        near = [known[word] for word in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(
            f"There is no trainer called {name!r}: {hint}Available: {', '.join(sorted(modules))}, and nnU-Net's own."
        )
    return stock


def _find_stock_trainer(name: str) -> type[nnUNetTrainer] | None:
    import nnunetv2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    with warnings.catch_warnings():
        # The search imports modules of nnU-Net that use what torch calls deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        found = recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer", nnunetv2.__path__[0])
    # The search takes whatever has the name, such as what those modules import.
    return found if isinstance(found, type) and issubclass(found, nnUNetTrainer) else None
