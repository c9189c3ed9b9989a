"""The files around the code: versions, constraints, README, wheel, and nothing of anybody's own machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lgssl_nnunet

MAPPED_ROOMS = ("trainers", "plans", "dataset_conversion")
COMMANDS = {e.name: e.value for e in distribution("lgssl_nnunet").entry_points if e.group == "console_scripts"}
NOT_SOURCE = (
    ".git",
    "*.egg-info",
    "build",
    "dist",
    "__pycache__",
    ".venv",
    "venv",
    "nnUNet_*",
    "lgssl_demo",
    ".*_cache",
)


def repository_files(root: Path) -> list[Path]:
    """Return the files that git tracks or would track; skip outside a git checkout."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [root / name for name in listing.stdout.split("\0") if name and (root / name).is_file()]


def pinned(root: Path) -> dict[str, Requirement]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def shell_lines(markdown: str) -> list[str]:
    """Return the lines of fenced and indented code that call one of our commands, without a prompt sign."""
    return [
        line.strip().removeprefix("$ ") for line in markdown.splitlines() if re.match(r"\s*(\$ )?.*\blgssl_\w+ ", line)
    ]


def test_the_top_level_is_the_agreed_one(root):
    allowed = {
        "lgssl_nnunet", "dataset_conversion", "plans", "trainers", "tests", "benchmarks", "docs", "examples", ".ci",
        "setup.py", "pyproject.toml", "README.md", "constraints.txt", "conftest.py", "LICENSE", "CITATION.cff",
        "CHANGELOG.md", "ARCHITECTURE.md", "CONTRIBUTING.md", ".gitignore", ".pre-commit-config.yaml",
    }  # fmt: skip
    assert {path.relative_to(root).parts[0] for path in repository_files(root)} - allowed == set()


def test_version_is_the_same_everywhere(root):
    versions = {
        "package": lgssl_nnunet.__version__,
        "installed": distribution("lgssl_nnunet").version,
        "setup.py": re.search(r'version="([^"]+)"', (root / "setup.py").read_text(encoding="utf-8"))[1],
        "CITATION.cff": re.search(r"^version: (\S+)", (root / "CITATION.cff").read_text(encoding="utf-8"), re.M)[1],
    }
    assert set(versions.values()) == {lgssl_nnunet.__version__}, versions


def test_citation_names_nnunet_and_the_lg_ssl_repository(root):
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert "10.1038/s41592-020-01008-z" in text
    assert "Lry777/Universal-Medical-SSL" in text


def test_every_direct_dependency_is_pinned_to_a_version_that_setup_py_allows(root):
    pins = pinned(root)
    for requirement in map(Requirement, requires("lgssl_nnunet")):
        extra = str(requirement.marker or "")
        if "text" in extra and canonicalize_name(requirement.name) not in pins:
            continue  # pinned in setup.py itself
        pin = pins[canonicalize_name(requirement.name)]
        version = next(iter(pin.specifier)).version
        assert requirement.specifier.contains(version), f"{pin} does not satisfy {requirement}"


def test_readme_names_every_command_and_no_other(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    called = {word for line in shell_lines(readme) for word in re.findall(r"(?<![\w./-])(lgssl_\w+)(?=\s|$)", line)}
    called -= {"lgssl_nnunet"}
    assert called - set(COMMANDS) == set()
    assert {name for name in COMMANDS if name not in readme} == set()


def test_every_command_is_a_main_function_that_returns_an_exit_status():
    for name, target in COMMANDS.items():
        assert target == f"lgssl_nnunet.cli.{name.removeprefix('lgssl_')}:main"
        assert callable(next(e for e in distribution("lgssl_nnunet").entry_points if e.name == name).load())


def test_files_carry_no_path_of_a_machine_they_were_made_on(root):
    machine_path = re.compile("(?<![\\w.~])/(" + "|".join(("work", "root", "home", "tmp")) + ")/")
    found = []
    for path in repository_files(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(root)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if machine_path.search(line)
        ]
    assert found == []


def test_tests_have_unique_names_and_no_init_files(root):
    tests = list((root / "tests").rglob("*.py"))
    names = [path.name for path in tests if path.name != "conftest.py"]
    assert "__init__.py" not in names
    assert sorted(names) == sorted(set(names))


@pytest.mark.slow
def test_wheel_holds_the_whole_package_and_nothing_generic_at_top_level(root, tmp_path):
    pytest.importorskip("setuptools")
    checkout = tmp_path / "checkout"
    shutil.copytree(root, checkout, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path), str(checkout)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    info = f"lgssl_nnunet-{lgssl_nnunet.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lgssl_nnunet", info}
    sources = {
        path.relative_to(root).as_posix()
        if folder == "lgssl_nnunet"
        else f"lgssl_nnunet/{path.relative_to(root).as_posix()}"
        for folder in ("lgssl_nnunet", *MAPPED_ROOMS)
        for path in (root / folder).rglob("*.py")
    }
    bank = {p.relative_to(root).as_posix() for p in (root / "lgssl_nnunet/text/bank").iterdir() if p.is_file()}
    assert sources | bank | {"lgssl_nnunet/py.typed"} <= names
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in names)
