"""The package's sources, parsed once for all tests of the house."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED_ROOMS = ("trainers", "plans", "dataset_conversion")


@dataclass(frozen=True)
class Source:
    """One module of the package: where it lies, how it is imported, in which room it is."""

    path: Path
    module: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """First word after the package's name; the module's own name for modules at the top."""
        return [*self.module.split("."), ""][1] or "__init__"

    def at(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(ROOT)}:{node.lineno}"


def read_source(path: Path) -> Source:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = list(relative.parts if relative.parts[0] == "lgssl_nnunet" else ("lgssl_nnunet", *relative.parts))
    text = path.read_text(encoding="utf-8")
    return Source(path, ".".join(part for part in parts if part != "__init__"), text, ast.parse(text))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    folders = (ROOT / "lgssl_nnunet", *(ROOT / room for room in MAPPED_ROOMS))
    return [read_source(path) for folder in folders for path in sorted(folder.rglob("*.py"))]
