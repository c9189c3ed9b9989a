"""What `train` takes, what it refuses in a sentence, and that a killed training goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lgssl_nnunet.errors import CheckpointError, PlansError, SplitError, UsageError
from lgssl_nnunet.training import parse_fold, train

BASE = "LGSSLCPUPlans"


def existing_run(folder: Path, *names: str) -> None:
    for name in names:
        (folder / "fold_all").mkdir(parents=True, exist_ok=True)
        (folder / "fold_all" / name).write_bytes(b"")


@pytest.fixture
def run_folder(tmp_path, dataset) -> Path:
    return tmp_path / "nnUNet_results" / dataset.name / f"SupervisedTrainer__{BASE}__3d_fullres"


@pytest.mark.parametrize(("word", "fold"), [("all", "all"), ("0", 0), (4, 4)])
def test_a_fold_is_all_or_zero_to_four(word, fold):
    assert parse_fold(word) == fold


@pytest.mark.parametrize("word", ["5", -1, "", "ALL", "first", 0.5])
def test_another_fold_is_refused(word):
    with pytest.raises(UsageError, match="use all, or 0 to 4"):
        parse_fold(word)


# -------------------------------------------------------------------------------------------- dataset, plans, trainer


@pytest.mark.parametrize("name", [901, "901", "Dataset901_Phantom"])
def test_a_dataset_is_found_by_id_and_by_name(name, dataset, without_training):
    assert train(name, trainer="SupervisedTrainer", device="cpu").parent.name == dataset.name


@pytest.mark.parametrize("name", [902, "Phantom", 1, "Dataset901", "0901x"])
def test_an_unknown_dataset_is_told_the_known_ones(name, dataset):
    with pytest.raises(UsageError, match=r"There is no preprocessed dataset .* It holds: Dataset901_Phantom\."):
        train(name, device="cpu")


def test_an_id_that_two_datasets_have_is_refused(dataset):
    (dataset.preprocessed.parent / "Dataset901_Twin").mkdir()
    with pytest.raises(UsageError, match="There is more than one preprocessed dataset 901"):
        train(901, device="cpu")


def test_an_empty_folder_says_what_to_do_first(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(UsageError, match="Plan it with lgssl_plan_and_preprocess first"):
        train(901, device="cpu")


def test_an_unknown_trainer_is_offered_the_nearest_names(dataset):
    with pytest.raises(UsageError, match=r"no trainer called 'LGSLTrainer': did you mean LGSSLTrainer"):
        train(901, trainer="LGSLTrainer", device="cpu")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [("3d_lowres", "no configuration 3d_lowres; they have"), ("3d_cascade_fullres", "cascade is not supported")],
)
def test_a_configuration_that_is_not_planned_is_refused(configuration, message, train_tiny):
    with pytest.raises(PlansError, match=message):
        train_tiny(configuration)


def test_plans_that_do_not_exist_are_refused_and_the_existing_ones_named(train_tiny, add_plans):
    add_plans(f"{BASE}_labeled4")
    with pytest.raises(PlansError, match=f"no plans Nothing in .*: {BASE}, {BASE}_labeled4"):
        train_tiny(plans="Nothing")


def test_a_dataset_with_plans_of_nnunet_only_is_refused(dataset, train_tiny):
    plans = dataset.plans()
    del plans["lgssl"]
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    dataset.plans_file.unlink()
    with pytest.raises(PlansError, match="holds no plans of lgssl_plan_and_preprocess"):
        train_tiny()


def test_plans_of_nnunet_named_on_purpose_are_refused_by_our_trainers(dataset, train_tiny):
    plans = dataset.plans() | {"plans_name": "nnUNetPlans"}
    del plans["lgssl"]
    (dataset.preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(PlansError, match="SupervisedTrainer needs plans made by lgssl_plan_and_preprocess"):
        train_tiny(plans="nnUNetPlans")


def test_without_a_name_the_newest_plans_are_taken(add_plans, train_tiny, without_training, caplog):
    newest, older = add_plans(f"{BASE}_labeled2"), add_plans(f"{BASE}_labeled4")
    for age, file in enumerate((newest, older, older.with_name(f"{BASE}.json"))):
        os.utime(file, (2_000_000_000 - age, 2_000_000_000 - age))
    with caplog.at_level("INFO", "lgssl_nnunet"):
        assert train_tiny().name == f"SupervisedTrainer__{BASE}_labeled2__3d_fullres"
    assert f"Using the newest plans, {BASE}_labeled2 (others: {BASE}, {BASE}_labeled4" in caplog.text


def test_derived_plans_are_only_taken_by_name(train_tiny, without_training):
    train_tiny(epochs=3)
    assert train_tiny().name == f"SupervisedTrainer__{BASE}__3d_fullres"
    assert train_tiny(plans=f"{BASE}_e3").name == f"SupervisedTrainer__{BASE}_e3__3d_fullres"


def test_damaged_and_foreign_json_files_do_not_disturb(dataset, train_tiny, without_training):
    (dataset.preprocessed / "notes.json").write_text("[1, 2]")
    (dataset.preprocessed / "half.json").write_text('{"lgssl": ')
    train_tiny()


def test_a_fold_of_too_few_labeled_cases_is_refused(dataset, train_tiny):
    plans = dataset.plans()
    plans["lgssl"]["split"]["labeled"] = plans["lgssl"]["split"]["labeled"][:4]
    dataset.plans_file.write_text(json.dumps(plans))
    with pytest.raises(SplitError, match="needs at least 5 labelled cases"):
        train_tiny(fold=0)


# -------------------------------------------------------------------------------------------------- options, old runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"continue_training": True, "only_validate": True}, "--c continues .* give one"),
        ({"continue_training": True, "pretrained_weights": "x.pth"}, "exclude each other"),
        ({"validate_best": True, "disable_checkpointing": True}, "--val_best needs the checkpoint"),
        ({"pretrained_weights": "nowhere.pth"}, "does not exist: nowhere.pth"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message, train_tiny):
    with pytest.raises(UsageError, match=message):
        train_tiny(**options)


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"])
def test_an_existing_run_is_not_overwritten(name, train_tiny, run_folder):
    existing_run(run_folder, name)
    with pytest.raises(CheckpointError, match=f"already holds {name}: continue it with --c"):
        train_tiny()


def test_another_fold_of_an_existing_run_is_free(train_tiny, run_folder, without_training, monkeypatch):
    import lgssl_nnunet.training

    monkeypatch.setattr(lgssl_nnunet.training, "_validate", lambda *arguments: None)
    existing_run(run_folder, "checkpoint_final.pth")
    assert train_tiny(fold=0) == run_folder


def test_validation_needs_a_finished_training(train_tiny, run_folder):
    existing_run(run_folder, "checkpoint_latest.pth")
    with pytest.raises(CheckpointError, match=r"has no checkpoint_final.pth: train first"):
        train_tiny(only_validate=True)


def test_continuing_without_a_checkpoint_starts_anew_and_says_so(train_tiny, without_training, caplog):
    train_tiny(continue_training=True)
    assert without_training.trainer.current_epoch == 0
    assert "holds no checkpoint to continue from: starting a new training." in caplog.text


def test_continuing_with_other_options_names_the_unfinished_run(train_tiny, without_training, run_folder, caplog):
    other = run_folder.with_name(run_folder.name.replace("__3d", "_e9__3d"))
    existing_run(other, "checkpoint_latest.pth")
    train_tiny(continue_training=True)
    assert f"Unfinished are {other.name}/fold_all; they continue with --c and their own options." in caplog.text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("checkpoint_latest.pth", {"continue_training": True}),
        ("checkpoint_final.pth", {"only_validate": True}),
        ("checkpoint_best.pth", {"validate_best": True, "continue_training": True}),
    ],
)
def test_a_cut_off_checkpoint_is_a_sentence_with_the_way_out(name, options, train_tiny, run_folder):
    train_tiny(epochs=1)
    fold = run_folder.with_name(run_folder.name.replace("__3d", "_e1__3d")) / "fold_all"
    whole = (fold / "checkpoint_final.pth").read_bytes()
    if name == "checkpoint_latest.pth":
        for other in fold.glob("*.pth"):
            other.unlink()
    (fold / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{name} (cannot be read .*it )?is damaged.* Move (it|them) away"):
        train_tiny(epochs=1, **options)


def test_without_checkpointing_none_is_written(train_tiny):
    folder = train_tiny(epochs=1, disable_checkpointing=True)
    assert (folder / "plans.json").is_file()
    assert not list(folder.rglob("*.pth"))


# ----------------------------------------------------------------------------------------------- training and killing


def test_a_training_leaves_an_nnunet_model_folder(train_tiny):
    folder = train_tiny("2d", "LGSSLTrainer", epochs=1)
    assert {"plans.json", "dataset.json", "dataset_fingerprint.json", "fold_all"} <= {f.name for f in folder.iterdir()}
    files = {file.name for file in (folder / "fold_all").iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "lgssl_terms.csv", "debug.json"} <= files
    assert "checkpoint_latest.pth" not in files
    assert not [name for name in files if name.endswith(".tmp")]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_finished_training_without_a_whole_final_checkpoint_gets_it_back(is_there, train_tiny, same, caplog):
    folder = train_tiny(epochs=1) / "fold_all"
    final = folder / "checkpoint_final.pth"
    whole = final.read_bytes()
    before = torch.load(final, weights_only=False)
    (folder / "checkpoint_best.pth").write_bytes(whole)
    final.write_bytes(whole[: len(whole) // 2])
    if not is_there:
        final.unlink()
    train_tiny(epochs=1, continue_training=True)
    assert f"{final} is written anew from its last state" in caplog.text
    assert same(torch.load(final, weights_only=False)["network_weights"], before["network_weights"])


def test_a_finished_training_that_is_continued_stays_as_it_is(train_tiny, same):
    def weights(folder: Path):
        return torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=False)

    first = weights(train_tiny(epochs=1))
    second = weights(train_tiny(epochs=1, continue_training=True))
    assert same(first["network_weights"], second["network_weights"])
    assert first["current_epoch"] == second["current_epoch"] == 1


@pytest.mark.parametrize("where", ["train_step", "save_checkpoint"])
@pytest.mark.parametrize("trainer", ["SupervisedTrainer", "LGSSLTrainer"])
def test_a_killed_training_continues_as_if_nothing_had_happened(trainer, where, train_tiny, monkeypatch, same, caplog):
    from lgssl_nnunet.trainers.base import SemiSupervisedTrainer

    def final(folder: Path) -> dict:
        return torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=False)

    options = {"trainer": trainer, "epochs": 3}
    original = getattr(SemiSupervisedTrainer, where)

    def killed(self, *arguments):
        done = self.iteration if where == "train_step" else self.iteration - 1
        if done == 3:  # in the middle of the second epoch, or just before its checkpoint is written
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SemiSupervisedTrainer, where, killed)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(**options)
    assert "Stopped in epoch 2 of 3." in caplog.text
    assert "checkpoint_latest.pth: the same command with --c goes on from it." in caplog.text
    with pytest.raises(CheckpointError, match=r"already holds checkpoint_latest.pth"):
        train_tiny(**options)
    resumed = final(train_tiny(**options, continue_training=True))
    assert resumed["current_epoch"] == 3
    shutil.rmtree(os.environ["nnUNet_results"])
    whole = final(train_tiny(**options))
    for key in ("network_weights", "optimizer_state", "lgssl", "_best_ema"):
        assert same(whole[key], resumed[key]), key


def test_an_interruption_before_the_first_checkpoint_says_so(train_tiny, monkeypatch, caplog):
    from lgssl_nnunet.trainers.base import SemiSupervisedTrainer

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(epochs=1)
    assert "Stopped in epoch 1 of 1. Nothing is saved yet" in caplog.text


def test_trainers_of_nnunet_are_refused_on_our_plans_because_they_would_ignore_them(train_tiny):
    with pytest.raises(PlansError, match=r"nnUNetTrainer is nnU-Net's own .* train SupervisedTrainer"):
        train_tiny(trainer="nnUNetTrainer", epochs=1)
