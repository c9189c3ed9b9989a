"""Refuse to run the tests against a checkout that is not installed: its folders would import under wrong names."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_configure() -> None:
    """Stop with one sentence when `lgssl_nnunet` and its mapped rooms cannot be imported."""
    for room in ("lgssl_nnunet.trainers", "lgssl_nnunet.plans"):
        try:
            found = importlib.util.find_spec(room) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            remedy = 'run `pip install -c constraints.txt -e ".[test]"` in this folder first'
            raise pytest.UsageError(f"{room} is not installed: {remedy}.")
