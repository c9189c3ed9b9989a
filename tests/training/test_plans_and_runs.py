"""A training runs on what was preprocessed, and continues only on the plans with which it began."""

from __future__ import annotations

import json
import shutil

import pytest

from lgssl_nnunet.errors import CheckpointError, PlansError


def test_a_configuration_that_is_planned_but_not_preprocessed_is_refused(dataset, train_tiny):
    plans = dataset.plans()
    shutil.rmtree(dataset.preprocessed / plans["configurations"]["3d_fullres"]["data_identifier"])
    with pytest.raises(PlansError, match="planned but not preprocessed"):
        train_tiny()


def test_a_run_does_not_continue_on_plans_that_were_replaced(train_tiny):
    model = train_tiny()
    plans = json.loads((model / "plans.json").read_text())
    plans["lgssl"]["split"]["labeled"].pop()
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(CheckpointError, match="planned anew since this run started"):
        train_tiny(continue_training=True)


def test_nor_does_a_run_on_several_gpus(train_tiny, monkeypatch):
    model = train_tiny()
    plans = json.loads((model / "plans.json").read_text())
    plans["lgssl"]["split"]["labeled"].pop()
    (model / "plans.json").write_text(json.dumps(plans))
    monkeypatch.setattr("lgssl_nnunet.training._train_distributed", lambda *arguments: pytest.fail("it was started"))
    with pytest.raises(CheckpointError, match="planned anew since this run started"):
        train_tiny(continue_training=True, num_gpus=2)
