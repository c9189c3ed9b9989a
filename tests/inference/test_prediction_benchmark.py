"""What benchmarks/prediction.py and the measuring behind it count, by hand."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """Scripts beside each other import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
        yield


@pytest.fixture
def benchmark():
    return importlib.import_module("prediction")


@pytest.fixture
def measuring():
    return importlib.import_module("measuring")


def test_equal_voxels_are_counted_over_all_cases(benchmark):
    one = {"a": np.zeros((2, 2)), "b": np.ones((2, 3))}
    other = {"a": np.array([[0, 1], [0, 0]]), "b": np.ones((2, 3))}
    assert benchmark.equal_voxels(one, other) == pytest.approx(0.9)


def test_dice_is_the_mean_over_the_cases_of_each_label(benchmark):
    references = {"a": np.array([1, 1, 2, 0]), "b": np.array([1, 0, 2, 2])}
    masks = {"a": np.array([1, 0, 2, 0]), "b": np.array([0, 0, 2, 2])}
    # Label 1: 2/3 and 0; label 2: 1 and 1.
    assert benchmark.dice(masks, references) == pytest.approx([1 / 3, 1.0])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="memory is read from /proc, which Linux has")
def test_memory_is_that_of_a_process_and_its_descendants(measuring):
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        for _ in range(2000):
            family = measuring._family(process.pid)
            if len(family) == 2 and all(measuring._resident(pid) > 0 for pid in family):
                break
        process.communicate(b"\n")
    assert process.pid in family
    assert len(family) == 2
    assert os.getpid() not in family


def test_ratios_are_those_of_the_same_round(measuring):
    stock = measuring.Form("stock", Path(), [10.0, 20.0, 12.0], [100 * 2**20, 80 * 2**20, 90 * 2**20])
    ours = measuring.Form("ours", Path(), [5.0, 4.0, 3.0], [20 * 2**20, 25 * 2**20, 10 * 2**20])
    assert ours.row(stock) == "ours | 4.0 | 4.00 (2.00 to 5.00) | 25 | 0.25"


def test_a_command_that_fails_is_shown(measuring):
    form = measuring.Form("ours", Path())
    with pytest.raises(SystemExit, match="no such thing"):
        measuring.measure(form, [sys.executable, "-c", "raise SystemExit('no such thing')"], {})


def test_differences_of_preprocessed_cases_are_found(tmp_path):
    blosc2 = importlib.import_module("blosc2")
    preprocessing = importlib.import_module("preprocessing")
    plans = '{"configurations": {"2d": {"data_identifier": "nnUNetPlans_2d"}}}'
    forms = []
    for name, shift in (("stock", 0), ("ours", 1)):
        folder = tmp_path / name / "Dataset901_Tiny" / f"{preprocessing.PLANS[name]}_2d"
        folder.mkdir(parents=True)
        (folder.parent / "nnUNetPlans.json").write_text(plans)
        image, label = np.arange(11, dtype=np.float32), np.array([0, 0, 1, 1], dtype=np.int16)
        image[3] += shift
        label[2] -= shift
        blosc2.asarray(image, urlpath=str(folder / "case.b2nd"))
        blosc2.asarray(label, urlpath=str(folder / "case_seg.b2nd"))
        forms.append(SimpleNamespace(output=tmp_path / name))
    assert preprocessing.largest_difference(forms) == pytest.approx(0.1)
    assert preprocessing.smallest_dice(forms) == pytest.approx(2 / 3)


def test_augmentation_compares_label_maps_and_ends_where_they_differ(monkeypatch, capsys):
    augmentation = importlib.import_module("augmentation")
    words = "generated --shape 24 24 24 --patch 16 16 16 --classes 3 --batches 2"
    monkeypatch.setattr(sys, "argv", ["augmentation.py", *words.split()])
    monkeypatch.setattr(augmentation.torch, "set_num_threads", lambda number: None)
    augmentation.main()
    assert "| generated, 3 classes, 24 x 24 x 24 | 2 |" in capsys.readouterr().out
    monkeypatch.setattr(
        augmentation, "ours", lambda *arguments, **options: augmentation.stock(*arguments, **options) + 1
    )
    with pytest.raises(SystemExit, match="the label maps differ"):
        augmentation.main()
