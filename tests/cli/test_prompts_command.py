"""`lgssl_prompts` hands its arguments over and prints what the function found."""

from __future__ import annotations

import json

import pytest

from lgssl_nnunet.cli.prompts import build_parser, main
from lgssl_nnunet.plans import prompt_overview as module
from lgssl_nnunet.text.similarity import SIMILAR


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw" / "Dataset901_Kidneys"
    folder.mkdir(parents=True)
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "left kidney": 1, "right kidney": 2}}
    (folder / "dataset.json").write_text(json.dumps({**content, "file_ending": ".nii.gz"}))
    return folder.parent


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(module, "prompts", lambda dataset, **options: seen.append((dataset, options)))
    monkeypatch.setattr(module, "format_overview", lambda overview: "overview")
    return seen


def test_every_flag_reaches_the_function(calls, capsys):
    words = "-d 501 --prompts p.json --text_encoder minilm --ensemble_prompts --threshold 0.9 -o plot.png"
    assert main(words.split()) == 0
    expected = {
        "prompts": "p.json",
        "text_encoder": "minilm",
        "ensemble_prompts": True,
        "threshold": 0.9,
        "output": "plot.png",
    }
    assert calls == [("501", expected)]
    assert capsys.readouterr().out == "overview\n\nWritten: plot.png\n"


def test_without_flags_the_bank_is_asked_and_nothing_is_written(calls, capsys):
    assert main(["-d", "501"]) == 0
    ((_, options),) = calls
    assert (options["text_encoder"], options["threshold"], options["output"]) == ("bank", SIMILAR, None)
    assert not options["ensemble_prompts"]
    assert capsys.readouterr().out == "overview\n"


def test_output_shows_the_classes_and_warns_of_close_ones(raw, capsys):
    assert main(["-d", "901", "--raw", str(raw)]) == 0
    printed = capsys.readouterr()
    assert "2 left kidney   bank, by sentence  A computerized tomography of a left kidney" in printed.out
    assert "left kidney and right kidney (0.971)" in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("WARNING: Dataset901_Kidneys: to the text encoder these classes are nearly the same")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text_encoder", "file:none.npz"], "Bank none.npz does not exist"),
        (["--text_encoder", "bnak"], "Unknown text encoder 'bnak'"),
        (["-o", "plot.svg"], "the plot is a PNG"),
    ],
)
def test_a_refusal_is_one_sentence_and_exit_status_two(raw, capsys, words, message):
    assert main(["-d", "901", "--raw", str(raw), *words]) == 2
    printed = capsys.readouterr()
    assert (message in printed.err, len(printed.err.splitlines()), printed.out) == (True, 1, "")


def test_every_flag_is_explained_with_its_default():
    for action in build_parser()._actions:
        if action.option_strings and action.dest not in ("help", "debug", "raw", "preprocessed", "results"):
            assert action.required or "default" in (action.help or ""), action.option_strings
