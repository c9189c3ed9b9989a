"""`lgssl_sparse_annotation` hands its arguments over and reports."""

from __future__ import annotations

import pytest

from lgssl_nnunet.cli.sparse_annotation import build_parser, main
from lgssl_nnunet.errors import PlansError
from lgssl_nnunet.plans import sparse_annotation as module


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "sparse_annotation", lambda dataset, **options: seen.append((dataset, options)) or "file"
    )
    return seen


def test_every_flag_reaches_the_function(calls, capsys):
    words = "-d 501 -p MyPlans -c 3d_fullres 3d_lowres --slices s.json --registration ants -np 3 --no_pbar"
    assert main(words.split()) == 0
    expected = {
        "plans": "MyPlans",
        "configurations": ["3d_fullres", "3d_lowres"],
        "slices": "s.json",
        "registration": "ants",
        "num_processes": 3,
        "progress": False,
    }
    assert calls == [("501", expected)]
    assert capsys.readouterr().out == "file\n"


def test_without_flags_the_newest_plans_and_3d_fullres_are_annotated(calls):
    assert main(["-d", "501", "-np", "0"]) == 0
    expected = {
        "plans": None,
        "configurations": ["3d_fullres"],
        "slices": None,
        "registration": "simpleitk",
        "num_processes": 0,
        "progress": True,
    }
    assert calls == [("501", expected)]


def test_a_refusal_is_one_sentence_and_exit_status_two(monkeypatch, capsys):
    def refuse(dataset, **options):
        raise PlansError("These plans cannot be used.")

    monkeypatch.setattr(module, "sparse_annotation", refuse)
    assert main(["-d", "501"]) == 2
    assert capsys.readouterr().err.endswith("error: These plans cannot be used.\n")


def test_the_help_says_every_default(capsys):
    text = " ".join(build_parser().format_help().split())
    for default in ("the newest plans of the dataset", "the middle slices", "3d_fullres", "simpleitk"):
        assert f"default: {default}" in text
