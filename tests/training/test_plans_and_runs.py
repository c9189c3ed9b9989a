"""A training runs on what was preprocessed, and continues only on the plans with which it began."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import pytest
import torch

from lgssl_nnunet.errors import CheckpointError, DatasetError, LGSSLError, PlansError, UsageError
from lgssl_nnunet.training import train


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
    with pytest.raises(CheckpointError, match="planned anew since these folds"):
        train_tiny(continue_training=True)


@pytest.mark.parametrize("options", [{"only_validate": True}, {"fold": 0}])
def test_nor_is_it_validated_or_joined_by_another_fold(options, train_tiny):
    model = train_tiny()
    plans = json.loads((model / "plans.json").read_text())
    plans["lgssl"]["split"]["labeled"].reverse()
    (model / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(CheckpointError, match="planned anew since these folds"):
        train_tiny(**options)


def test_a_trial_without_checkpoints_does_not_touch_a_run_that_is_there(train_tiny):
    model = train_tiny()
    with pytest.raises(CheckpointError, match="already holds"):
        train_tiny(disable_checkpointing=True)
    assert (model / "fold_all" / "checkpoint_final.pth").is_file()


def test_a_finished_run_is_not_written_again(train_tiny):
    checkpoint = train_tiny() / "fold_all" / "checkpoint_final.pth"
    before = checkpoint.stat().st_mtime_ns
    train_tiny(continue_training=True)
    assert checkpoint.stat().st_mtime_ns == before


def test_several_gpus_that_are_not_there_are_refused(dataset, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UsageError, match="-num_gpus 9: torch sees 2"):
        train(901, num_gpus=9)
    with pytest.raises(UsageError, match=r"9 processes on this machine, and torch sees 2"):
        train(901, num_gpus=9, device=torch.device("cuda"))
    with pytest.raises(UsageError, match="cuda:1 names one GPU"):
        train(901, num_gpus=2, device=torch.device("cuda:1"))


def test_the_method_refuses_before_several_processes_start(train_tiny, monkeypatch):
    monkeypatch.setattr("lgssl_nnunet.engine.launching.launch", lambda *arguments: pytest.fail("it was started"))
    with pytest.raises(UsageError, match="pairs every labelled"):
        train_tiny(trainer="LGSSLTrainer", num_gpus=2, unlabeled_batch_size=5)
    with pytest.raises(UsageError, match="BCPTrainer trains in one process only"):
        train_tiny(trainer="BCPTrainer", num_gpus=2)


def test_cases_that_are_not_preprocessed_are_named(train_tiny, dataset):
    name = dataset.plans()["lgssl"]["split"]["unlabeled"][0]
    (file,) = dataset.preprocessed.glob(f"*3d_fullres_unlabeled/{name}.b2nd")
    file.unlink()
    with pytest.raises(PlansError, match=f"1 cases are not preprocessed .*{name}"):
        train_tiny()


def test_nor_may_they_be_preprocessed_for_other_plans(train_tiny, dataset):
    plans = dataset.plans()
    plans["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0, 1.0]
    dataset.plans_file.write_text(json.dumps(plans))
    with pytest.raises(PlansError, match="are not preprocessed as"):
        train_tiny()


def test_nor_may_others_be_annotated_than_the_plans_say(train_tiny, dataset):
    file = dataset.preprocessed / "dataset.json"
    content = json.loads(file.read_text())
    case = dataset.plans()["lgssl"]["split"]["labeled"][0]
    name = next(name for name in content["labels"] if name != "background")
    file.write_text(json.dumps(content | {"annotated": {case: [name]}}))
    with pytest.raises(
        PlansError, match=rf"'annotated' of dataset.json was changed for {case} after .*: plan the dataset"
    ):
        train_tiny()
    file.write_text(json.dumps(content | {"annotated": [case]}))
    with pytest.raises(DatasetError, match=r"'annotated' is not an object"):
        train_tiny()


def test_nor_does_a_run_on_several_gpus(train_tiny, monkeypatch):
    model = train_tiny()
    plans = json.loads((model / "plans.json").read_text())
    plans["lgssl"]["split"]["labeled"].pop()
    (model / "plans.json").write_text(json.dumps(plans))
    monkeypatch.setattr("lgssl_nnunet.engine.launching.launch", lambda *arguments: pytest.fail("it was started"))
    with pytest.raises(CheckpointError, match="planned anew since these folds"):
        train_tiny(continue_training=True, num_gpus=2)


def put(*way: str, value: object) -> Callable[[dict], None]:
    def change(plans: dict) -> None:
        for name in way[:-1]:
            plans = plans[name]
        plans[way[-1]] = value

    return change


LAYERS = ("configurations", "3d_fullres", "architecture", "arch_kwargs")
WRONG_PLANS = {
    "a name elsewhere": (put("plans_name", value="../x"), "plans_name is no plain name"),
    "another dataset": (put("dataset_name", value="../Dataset901_Phantom"), "lie in the folder of Dataset901_Phantom"),
    "data elsewhere": (put("configurations", "2d", "data_identifier", value="../2d"), "data_identifier of 2d is no"),
    "a batch of text": (put("configurations", "2d", "batch_size", value="2"), "batch_size of 2d is no whole number"),
    "no configurations": (put("configurations", value=["3d_fullres"]), "configurations is no object of objects"),
    "a case elsewhere": (put("lgssl", "split", "labeled", value=["../a"]), "split in lgssl is not as planning writes"),
    "no split": (lambda plans: plans["lgssl"].pop("split"), "lgssl has no split"),
    "no learning rate": (lambda plans: plans["lgssl"]["schedule"].pop("initial_lr"), "schedule in lgssl is not as"),
    "an epoch of NaN": (put("lgssl", "schedule", "num_epochs", value=float("nan")), "schedule in lgssl is not as"),
    "vectors of text": (put("lgssl", "text", "embeddings", value=[["a"]]), "text in lgssl is not as planning writes"),
    "a fourth axis": (put("lgssl", "mirroring_axes", value=[3]), "mirroring_axes in lgssl is not as planning writes"),
    "options as a list": (put("lgssl", "training", value=[1]), "training in lgssl is not as planning writes"),
    "one twin": (put("lgssl", "twins", value=[["a"]]), "twins in lgssl is not as planning writes"),
    "classes as text": (put("lgssl", "partial_labels", value={"a": "liver"}), "partial_labels in lgssl is not as"),
    "not annotated so": (put("lgssl", "partial_labels", value={"a": ["heart"]}), "was changed for a after"),
    "unseen as text": (put("lgssl", "unseen_classes", value="liver"), "unseen_classes in lgssl is not as"),
    "slices as a list": (put("lgssl", "sparse_annotation", value={"slices": []}), "sparse_annotation in lgssl is not"),
    "a layer that is a function": (put(*LAYERS, "norm_op", value="os.abort"), "builds its network from os.abort"),
    "a kernel of text": (put(*LAYERS, "kernel_sizes", value="abc"), "makes no network for 3d_fullres"),
    "layers of another dimension": (
        put(*LAYERS, "conv_op", value="torch.nn.modules.conv.Conv2d"),
        "makes no network for 3d_fullres",
    ),
}


@pytest.mark.parametrize("kind", WRONG_PLANS)
def test_plans_of_another_form_are_refused_before_anything_is_made(kind, dataset, train_tiny, files_below):
    change, words = WRONG_PLANS[kind]
    plans = dataset.plans()
    change(plans)
    dataset.plans_file.write_text(json.dumps(plans))
    before = files_below(dataset.root)
    with pytest.raises(LGSSLError, match=words):
        train_tiny(plans=dataset.plans_file.stem)
    assert files_below(dataset.root) == before


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", '{"lgssl": 1'])
def test_plans_that_are_no_json_object_are_refused(content, dataset, train_tiny):
    dataset.plans_file.write_text(content)
    with pytest.raises(PlansError, match=r"not valid JSON|holds no JSON object"):
        train_tiny(plans=dataset.plans_file.stem)
    with pytest.raises(PlansError, match="holds no plans of lgssl_plan_and_preprocess"):
        train_tiny()
