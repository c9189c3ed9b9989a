"""What benchmarks/prediction.py counts, by hand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "prediction.py"
    spec = importlib.util.spec_from_file_location("prediction_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prediction_benchmark"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


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
def test_memory_is_that_of_a_process_and_its_descendants(benchmark):
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        for _ in range(2000):
            family = benchmark._family(process.pid)
            if len(family) == 2 and all(benchmark._resident(pid) > 0 for pid in family):
                break
        process.communicate(b"\n")
    assert process.pid in family
    assert len(family) == 2
    assert os.getpid() not in family
