"""A raw dataset and a tiny trained model, to be mutated; the model is that of tests/inference."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "inference_fixtures", Path(__file__).parents[1] / "inference/conftest.py"
)
_inference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_inference)

one_fold, trained, predict_here = _inference.one_fold, _inference.trained, _inference.predict_here


@pytest.fixture
def raw_dataset(new_phantom, tmp_path, monkeypatch) -> Path:
    """A raw dataset, number 901, in nnU-Net's folders below tmp_path."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / f"nnUNet_{name}"))
    return new_phantom(tmp_path, num_labeled=2, num_unlabeled=1, num_test=1)


@pytest.fixture
def model(one_fold, tmp_path) -> Path:
    """A copy of a finished model's folder."""
    name = "Dataset501_Tiny/nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    return Path(shutil.copytree(one_fold, tmp_path / "results")) / name
