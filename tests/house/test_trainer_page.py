"""docs/trainers.md says what the docstrings say."""

from __future__ import annotations

import importlib.util


def test_the_page_of_trainers_is_what_its_script_writes(root):
    spec = importlib.util.spec_from_file_location("write_trainers", root / "docs" / "write_trainers.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    remedy = "run python docs/write_trainers.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), remedy
