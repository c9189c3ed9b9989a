"""A tiny planned dataset of one's own per test, and `train` on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lgssl_nnunet.engine.logs import TermLog
from lgssl_nnunet.training import train


@pytest.fixture
def dataset(tiny_dataset, tmp_path, monkeypatch):
    """A copy of the tiny dataset that nnU-Net's variables point to; curves are not drawn."""
    from nnunetv2.training.logging.nnunet_logger import MetaLogger

    own = tiny_dataset().copied_to(tmp_path)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda *arguments: None)
    monkeypatch.setattr(TermLog, "plot", lambda *arguments: None)
    return own


@pytest.fixture
def add_plans(dataset) -> Callable[..., Path]:
    """Write a copy of the plans under another name."""

    def add(name: str, **lgssl: Any) -> Path:
        plans = dataset.plans() | {"plans_name": name}
        plans["lgssl"].update(lgssl)
        file = dataset.preprocessed / f"{name}.json"
        file.write_text(json.dumps(plans))
        return file

    return add


@pytest.fixture
def train_tiny(dataset) -> Callable[..., Path]:
    """`train` for the tiny dataset, SupervisedTrainer unless said otherwise."""

    def run(configuration: str = "3d_fullres", trainer: str = "SupervisedTrainer", **options: Any) -> Path:
        return train(901, configuration, trainer, device="cpu", progress=False, **options)

    return run


@pytest.fixture
def without_training(monkeypatch) -> SimpleNamespace:
    """Everything up to the first iteration and nothing after it; holds the trainer that would have trained."""
    from lgssl_nnunet.trainers.base import SemiSupervisedTrainer

    seen = SimpleNamespace(trainer=None)
    monkeypatch.setattr(SemiSupervisedTrainer, "run_training", lambda trainer: setattr(seen, "trainer", trainer))
    return seen
