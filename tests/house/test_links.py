"""Links between the documents lead to files of the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def is_ignored(file: Path) -> bool:
    """Whether git leaves a file out, so that it is in this folder and in nobody else's."""
    if not (ROOT / ".git").exists():
        return False
    return subprocess.run(["git", "check-ignore", "-q", str(file)], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files_that_everybody_has(page):
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    files = [(page.parent / target).resolve() for target in targets]
    assert [str(file.relative_to(ROOT)) for file in files if not file.exists() or is_ignored(file)] == []


def test_the_figures_of_the_benchmark_are_in_the_repository():
    for name in ("results_per_case.csv", "results_per_cell.csv"):
        file = ROOT / "benchmarks" / "results" / name
        assert file.is_file()
        assert not is_ignored(file)
