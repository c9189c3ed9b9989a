"""The demo: it keeps its hands off other people's folders, and it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lgssl_nnunet.cli import demo as command
from lgssl_nnunet.demonstration import BASELINE, METHOD, DemoResult, demo, draw_overlays
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset

SHORT_DEMO = """
import sys

from lgssl_nnunet.demonstration import demo
from lgssl_nnunet.phantom import PhantomSpec

spec = PhantomSpec(num_labeled=2, num_unlabeled=2, num_test=2, shape=(24, 24, 24))
result = demo(sys.argv[1], iterations=2, num_processes=0, spec=spec, device="cpu", progress=False)
print(result.table())
"""


@pytest.fixture
def no_pipeline(monkeypatch):
    """Let the demo end where its work would begin, whatever this process has imported before."""

    class Reached(Exception):  # noqa: N818 (not an error)
        pass

    def stop(*args, **kwargs):
        raise Reached

    monkeypatch.setattr("lgssl_nnunet.demonstration.write_phantom_dataset", stop)
    return Reached


def test_a_folder_with_other_content_is_refused_and_left_alone(tmp_path, no_pipeline):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not made by lgssl_demo"):
        demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_nnunet_folders_of_the_user_are_refused(tmp_path, no_pipeline):
    (tmp_path / "nnUNet_results").mkdir()
    with pytest.raises(UsageError, match="-o"):
        demo(tmp_path)
    assert (tmp_path / "nnUNet_results").is_dir()


def test_a_file_is_refused(tmp_path, no_pipeline):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        demo(tmp_path / "file")


def test_a_folder_of_an_earlier_demo_is_cleared_of_what_the_demo_wrote_only(tmp_path, no_pipeline):
    with pytest.raises(no_pipeline):
        demo(tmp_path / "new")
    (tmp_path / "new" / "nnUNet_results" / "Dataset999_Phantom" / "old").mkdir(parents=True)
    (tmp_path / "new" / "nnUNet_results" / "Dataset501_Liver").mkdir(parents=True)
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(no_pipeline):
        demo(tmp_path / "new")
    assert [folder.name for folder in (tmp_path / "new" / "nnUNet_results").iterdir()] == ["Dataset501_Liver"]
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"


def test_without_a_name_the_folder_is_lgssl_demo_in_the_current_one(tmp_path, no_pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(no_pipeline):
        demo()
    assert (tmp_path / "lgssl_demo" / "lgssl_demo.json").is_file()


def test_the_environment_is_as_before_even_after_a_failure(tmp_path, no_pipeline, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "mine")
    monkeypatch.delenv("nnUNet_results", raising=False)
    with pytest.raises(no_pipeline):
        demo(tmp_path / "new")
    assert os.environ["nnUNet_raw"] == "mine"
    assert "nnUNet_results" not in os.environ


def test_no_iterations_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 1"):
        demo(tmp_path, iterations=0)


def test_the_table_has_a_row_per_trainer_and_a_column_per_class():
    dice = {BASELINE: {"liver": 0.5, "gallbladder": 0.25}, METHOD: {"liver": 0.75, "gallbladder": 0.5}}
    lines = DemoResult(Path("x"), dice, Path("x.png"), {}).table().splitlines()
    assert lines[0].split()[-3:] == ["liver", "gallbladder", "mean"]
    assert lines[1].split() == [BASELINE, "0.500", "0.250", "0.375"]
    assert lines[2].split() == [METHOD, "0.750", "0.500", "0.625"]


@pytest.mark.parametrize("shape", [(16, 20, 20), (32, 32)])
def test_overlays_are_drawn_for_every_trainer_and_test_case(tmp_path, shape):
    spec = PhantomSpec(num_labeled=0, num_unlabeled=0, num_test=3, shape=shape)
    dataset = write_phantom_dataset(tmp_path, spec)
    predictions = {BASELINE: dataset / "labelsTs", METHOD: dataset / "labelsTs"}
    file = draw_overlays(dataset, predictions, tmp_path / "overlays.png")
    assert file.read_bytes().startswith(b"\x89PNG")


def test_the_command_passes_what_was_typed_and_prints_the_table(tmp_path, monkeypatch, capsys):
    seen = {}

    def fake(output, **options):
        seen.update(options, output=output)
        return DemoResult(tmp_path, {METHOD: {"liver": 0.5}}, tmp_path / "overlays.png", {"plan": 2.0})

    monkeypatch.setattr("lgssl_nnunet.demonstration.demo", fake)
    assert command.main(["-o", "there", "--iterations", "7", "--seed", "3", "-device", "cpu", "--no_pbar"]) == 0
    assert seen == {"output": "there", "iterations": 7, "seed": 3, "device": "cpu", "progress": False}
    printed = capsys.readouterr().out
    assert "LGSSLTrainer" in printed
    assert str(tmp_path / "overlays.png") in printed


@pytest.mark.slow
def test_a_very_short_demo_runs_to_the_table_and_the_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHORT_DEMO, str(tmp_path / "demo")],
        capture_output=True, encoding="utf-8", check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert METHOD in done.stdout
    folder = tmp_path / "demo"
    dice = json.loads((folder / "dice.json").read_text())
    assert set(dice) == {BASELINE, METHOD}
    assert all(set(values) == {"liver", "gallbladder"} for values in dice.values())
    assert all(0 <= value <= 1 or np.isnan(value) for values in dice.values() for value in values.values())
    assert (folder / "overlays.png").is_file()
    assert len(list((folder / "predictions" / METHOD).glob("*.nii.gz"))) == 2
    assert len(list((folder / "nnUNet_results").rglob("checkpoint_final.pth"))) == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["demo"]
