"""`lgssl_train`: which words mean what."""

from __future__ import annotations

from pathlib import Path

import pytest

import lgssl_nnunet.training
from lgssl_nnunet.cli.train import build_parser, main, parse_settings, understand_words
from lgssl_nnunet.errors import UsageError


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Run the command with a `train` that only notes its arguments."""
    noted = {}

    def train(*args, **kwargs):
        noted.update(kwargs, args=args)
        return Path("model")

    monkeypatch.setattr(lgssl_nnunet.training, "train", train)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))

    def run(*words: str) -> dict:
        noted["status"] = main(["901", "3d_fullres", *words, "-device", "cpu"])
        return noted

    return run


@pytest.mark.parametrize(
    ("words", "understood"),
    [
        ((None, None, None), ("LGSSLTrainer", "all")),
        (("SupervisedTrainer", None, None), ("SupervisedTrainer", "all")),
        (("SupervisedTrainer", None, "2"), ("SupervisedTrainer", "2")),
        (("0", None, None), ("LGSSLTrainer", "0")),
        (("all", "SupervisedTrainer", None), ("SupervisedTrainer", "all")),
        (("3", "SupervisedTrainer", None), ("SupervisedTrainer", "3")),
        ((None, "SupervisedTrainer", "1"), ("SupervisedTrainer", "1")),
        (("1", None, "1"), ("LGSSLTrainer", "1")),
        (("-1", None, None), ("LGSSLTrainer", "-1")),
    ],
)
def test_the_third_word_is_a_trainer_or_a_fold(words, understood):
    assert understand_words(*words) == understood


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("0", None, "1"), "Two different folds were given, 0 and 1"),
        (("LGSSLTrainer", "SupervisedTrainer", None), "Two different trainers were given, LGSSLTrainer and Superv"),
    ],
)
def test_the_same_thing_said_differently_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        understand_words(*words)


def test_settings_are_pairs_of_name_and_value():
    assert parse_settings(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    assert parse_settings([]) == {}


def test_settings_without_a_value_are_refused_together():
    with pytest.raises(UsageError, match="--set takes name=value, not a, b"):
        parse_settings(["a", "ok=1", "b"])


def test_a_bare_command_passes_the_defaults_on(asked, capsys):
    noted = asked()
    assert noted["status"] == 0
    assert noted["args"] == ("901", "3d_fullres", "LGSSLTrainer")
    changed = {name: value for name, value in noted.items() if value not in (None, False, {})}
    assert changed.keys() == {"args", "fold", "num_gpus", "device"}
    assert noted["fold"] == "all"
    assert capsys.readouterr().out.splitlines()[-1] == "Model: model"


def test_every_option_reaches_the_function(asked):
    words = (
        "0 -tr SupervisedTrainer -p P --epochs 3 --iterations_per_epoch 4 --unlabeled_batch_size 5 --seed 6 "
        "--set a=1 --set b=2 -pretrained_weights F -num_gpus 2 --npz --c --val --val_best --disable_checkpointing "
        "--no_pbar"
    )
    noted = asked(*words.split())
    assert noted["args"] == ("901", "3d_fullres", "SupervisedTrainer")
    expected = {
        "fold": "0",
        "plans": "P",
        "epochs": 3,
        "iterations_per_epoch": 4,
        "unlabeled_batch_size": 5,
        "seed": 6,
        "hyperparameters": {"a": "1", "b": "2"},
        "pretrained_weights": "F",
        "num_gpus": 2,
        "export_probabilities": True,
        "continue_training": True,
        "only_validate": True,
        "validate_best": True,
        "disable_checkpointing": True,
        "progress": False,
    }
    assert {name: noted[name] for name in expected} == expected


def test_what_was_understood_is_printed(asked, capsys):
    asked("2", "-tr", "SupervisedTrainer")
    assert "Understood: dataset 901, configuration 3d_fullres, trainer SupervisedTrainer, fold 2" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("words", [("0", "-f", "1"), ("--set", "weight")])
def test_wrong_use_ends_with_status_2_and_without_training(words, asked, capsys):
    noted = asked(*words)
    assert noted["status"] == 2
    assert "args" not in noted
    assert "Traceback" not in capsys.readouterr().err


def test_letters_are_those_of_nnunetv2_train():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert {"-tr", "-p", "-pretrained_weights", "-num_gpus", "--npz", "--c", "--val", "--val_best"} <= flags
    assert {"--disable_checkpointing", "-device"} <= flags
