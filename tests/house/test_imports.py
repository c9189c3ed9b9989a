"""Who may import whom: one direction, no way back."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import distribution

import pytest

FOUNDATION = {"errors", "paths", "files", "figures", "locks", "problems", "parallel", "workers", "signals"}
PARTS = {"data", "losses", "networks", "text", "engine"}
COMMAND_LEVEL = {"training", "demo", "cli", "nnunet_plugin"}
FORBIDDEN = {
    **dict.fromkeys(FOUNDATION, PARTS | COMMAND_LEVEL | {"plans", "trainers", "inference", "evaluation", "registry"}),
    **dict.fromkeys(PARTS, COMMAND_LEVEL | {"trainers", "inference", "evaluation"}),
    "plans": COMMAND_LEVEL | {"trainers", "inference", "evaluation", "registry"},
    "registry": COMMAND_LEVEL | {"trainers", "inference", "evaluation"},
    "trainers": COMMAND_LEVEL | {"evaluation"},
    "training": {"demo", "cli", "evaluation"},
    "inference": COMMAND_LEVEL | {"trainers", "evaluation"},
    "evaluation": {"cli", "demonstration", "nnunet_plugin"},
    "info": {"cli", "trainers", "training", "demo"},
    "demo": {"cli", "trainers"},
    "phantom": PARTS | COMMAND_LEVEL | {"plans", "trainers", "inference", "evaluation", "registry"},
    "nnunet_plugin": {"cli", "demo", "training"},
    "dataset_conversion": PARTS | COMMAND_LEVEL | {"trainers", "inference", "evaluation"},
}
COMMANDS = sorted(entry.name for entry in distribution("lgssl_nnunet").entry_points if entry.group == "console_scripts")


def imported_modules(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every import statement, function bodies included, with the dotted names that it may import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node, f"{prefix}.{alias.name}") for alias in node.names)


def room_edges(sources) -> dict[tuple[str, str], str]:
    """Return, for every pair (importing room, imported room), one place where it happens."""
    edges = {}
    for source in sources:
        for node, name in imported_modules(source.tree):
            parts = name.split(".")
            if parts[0] == "lgssl_nnunet" and len(parts) > 1 and parts[1] != source.room and source.room != "__init__":
                edges.setdefault((source.room, parts[1]), f"{source.at(node)} imports {name}")
    return edges


def test_no_room_imports_from_a_later_one(sources):
    edges = room_edges(sources)
    assert [place for (room, target), place in edges.items() if target in FORBIDDEN.get(room, ())] == []


def test_rooms_form_no_circle(sources):
    targets: dict[str, set[str]] = {}
    for room, target in room_edges(sources):
        targets.setdefault(room, set()).add(target)

    def circle(room: str, way: tuple[str, ...]) -> tuple[str, ...] | None:
        if room in way:
            return (*way[way.index(room) :], room)
        return next(filter(None, (circle(target, (*way, room)) for target in sorted(targets.get(room, ())))), None)

    assert [found for room in sorted(targets) if (found := circle(room, ()))] == []


def test_imports_are_absolute_and_never_by_the_bare_name_of_a_room(sources):
    bare = {"trainers", "plans", "dataset_conversion", "tests"}
    found = [
        f"{source.at(node)}: {name}"
        for source in sources
        for node, name in imported_modules(source.tree)
        if name.startswith(".") or name.split(".")[0] in bare
    ]
    assert found == []


def test_tests_and_benchmarks_import_rooms_through_the_package(root):
    bare = {"trainers", "plans", "dataset_conversion"}
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for folder in ("tests", "benchmarks", "docs")
        for path in (root / folder).rglob("*.py")
        for node, name in imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] in bare
    ]
    assert found == []


def test_only_commands_import_argparse_and_only_at_the_top_of_the_house(sources):
    found = [
        source.at(node)
        for source in sources
        if source.room != "cli" and not source.module.endswith("build_bank")
        for node, name in imported_modules(source.tree)
        if name == "argparse"
    ]
    assert found == []


@pytest.mark.parametrize("statement", ["import lgssl_nnunet", *(f"lgssl_nnunet.cli.{c[6:]}" for c in COMMANDS)])
def test_the_package_and_each_help_text_need_neither_torch_nor_nnunet(statement):
    if statement.startswith("lgssl_nnunet.cli"):
        statement = f"from {statement} import build_parser; build_parser().format_help()"
    heavy = "{'torch', 'nnunetv2', 'SimpleITK', 'matplotlib', 'scipy'}"
    check = f"import sys; {statement}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, encoding="utf-8", check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
