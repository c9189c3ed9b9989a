"""Habits that a machine can check: docstrings, type hints, sizes, plain errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator

LONGEST_FUNCTION = 60
LONGEST_METHOD_FILE = 150
VAGUE_NAMES = {"utils", "util", "misc", "helper", "helpers", "common_utils"}
Function = (ast.FunctionDef, ast.AsyncFunctionDef)


def public_definitions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield public functions and classes of a module, and public methods of its public classes."""
    for node in body:
        if isinstance(node, (*Function, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def missing_hints(function: ast.FunctionDef) -> list[str]:
    """Return the names of arguments without a type, and "return" when the result has none."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = [a.arg for a in given if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
    return missing + (["return"] if function.returns is None and function.name != "__init__" else [])


def length_without_docstring(function: ast.FunctionDef) -> int:
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function, clean=False) is None:
        return lines
    return lines - (function.body[0].end_lineno - function.body[0].lineno + 1)


def test_every_public_module_class_and_function_has_a_docstring(sources):
    missing = [
        f"{source.at(node)} {node.name}"
        for source in sources
        for node in public_definitions(source.tree.body)
        if not ast.get_docstring(node)
    ]
    missing += [str(s.path) for s in sources if s.text.strip() and not ast.get_docstring(s.tree)]
    assert missing == []


def test_every_public_function_is_typed(sources):
    missing = []
    for source in sources:
        constructors = [
            method
            for node in public_definitions(source.tree.body)
            if isinstance(node, ast.ClassDef)
            for method in node.body
            if isinstance(method, Function) and method.name == "__init__"
        ]
        for node in [*public_definitions(source.tree.body), *constructors]:
            if isinstance(node, Function) and (names := missing_hints(node)):
                missing.append(f"{source.at(node)} {node.name}: {', '.join(names)}")
    assert missing == []


def test_no_function_is_long(sources):
    long = [
        f"{source.at(node)} {node.name}: {length_without_docstring(node)} lines"
        for source in sources
        for node in functions(source.tree)
        if length_without_docstring(node) > LONGEST_FUNCTION
    ]
    assert long == []


def test_a_method_is_a_short_file(sources):
    lengths = {
        source.path.name: source.text.count("\n")
        for source in sources
        if source.room == "trainers" and source.path.name not in ("__init__.py", "base.py")
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_METHOD_FILE} == {}


def test_no_module_has_a_vague_name(sources):
    assert [str(source.path) for source in sources if source.path.stem in VAGUE_NAMES] == []


def test_library_code_logs_instead_of_printing(sources):
    printing = [
        source.at(node)
        for source in sources
        if source.room != "cli"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_user_errors_are_raised_not_asserted(sources):
    asserting = [
        source.at(node) for source in sources for node in ast.walk(source.tree) if isinstance(node, ast.Assert)
    ]
    assert asserting == []


def test_modules_log_under_their_own_name(sources):
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "logger":
                assert ast.unparse(node.value) == "logging.getLogger(__name__)", source.at(node)
