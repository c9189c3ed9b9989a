"""Options that differ from the plans go into plans of their own, so that no run overwrites another."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lgssl_nnunet.derived_plans import are_of_one_training, derive_plans, with_text
from lgssl_nnunet.errors import PlansError, PromptError, UsageError
from lgssl_nnunet.registry import find_trainer
from lgssl_nnunet.text.bank import EmbeddingBank
from lgssl_nnunet.training import train

BASE = "LGSSLCPUPlans"
OPTIONS = {
    "epochs": {"epochs": 3},
    "more epochs": {"epochs": 30},
    "iterations": {"iterations_per_epoch": 3},
    "seed": {"seed": 1},
    "another seed": {"seed": 2},
    "weight": {"hyperparameters": {"consistency_weight": "0.5"}},
    "tenth of it": {"hyperparameters": {"consistency_weight": "0.05"}},
    "mode": {"hyperparameters": {"prompt_mode": "fixed_volume"}},
    "switch": {"hyperparameters": {"residual_gate": "false"}},
    "two": {"epochs": 3, "seed": 1},
}
NOTHING_NEW = [
    {},
    {"epochs": 2, "iterations_per_epoch": 2},
    {"seed": 0},
    {"hyperparameters": {"consistency_weight": "1.0", "prompt_mode": "attention"}},
]


@dataclass(frozen=True)
class FreeWord:
    """A hyper-parameter that takes any word."""

    word: str = "default"


class FreeWordTrainer:
    """What a trainer shows of itself before it is built."""

    hyperparameters = FreeWord()


@pytest.fixture
def derive(tiny_dataset):
    """Derived plans of the tiny dataset (or of `plans`) for LGSSLTrainer, trained in the folder `model` or nowhere."""

    def run(plans=None, trainer="LGSSLTrainer", model=Path("nowhere"), **options):
        names = ("epochs", "iterations_per_epoch", "unlabeled_batch_size", "seed", "hyperparameters")
        plans = plans or tiny_dataset().plans()
        derived = derive_plans(plans, find_trainer(trainer), *(options.get(name) for name in names))
        return with_text(derived, plans, model)

    return run


@pytest.mark.parametrize("options", NOTHING_NEW)
def test_options_that_say_what_is_planned_derive_nothing(options, derive, tiny_dataset):
    plans = tiny_dataset().plans()
    assert derive(plans, **options) is plans
    assert plans == tiny_dataset().plans()


def test_every_set_of_options_has_a_name_of_its_own(derive):
    names = [derive(**options)["plans_name"] for options in OPTIONS.values()]
    assert len({BASE, *names}) == len(OPTIONS) + 1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_a_derived_name_keeps_the_folder_name_readable_for_nnunet(options, derive):
    name = derive(**options)["plans_name"]
    assert name.startswith(f"{BASE}_")
    assert "__" not in name
    assert not name.endswith("_")
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.+_-")


def test_words_with_underscores_and_signs_give_no_double_underscore(tiny_dataset):
    for value in ("__", "a__b", "_", "a/b", "../x", "ü", "a b"):
        plans = tiny_dataset().plans()
        name = derive_plans(plans, FreeWordTrainer, None, None, None, None, {"word": value})["plans_name"]
        assert "__" not in name
        assert "/" not in name


def test_derived_plans_change_nothing_but_name_schedule_and_training(derive, tiny_dataset):
    base = tiny_dataset().plans()
    derived = derive(
        epochs=3, iterations_per_epoch=4, seed=5, unlabeled_batch_size=1, hyperparameters={"ramp_fraction": "0.1"}
    )
    assert derived["plans_name"] == f"{BASE}_e3_i4_u1_s5_ramp_fraction-0.1"
    assert derived["lgssl"]["schedule"] == {**base["lgssl"]["schedule"], "num_epochs": 3, "iterations_per_epoch": 4}
    assert derived["lgssl"]["training"] == {
        "seed": 5,
        "unlabeled_batch_size": 1,
        "hyperparameters": {"ramp_fraction": 0.1},
        "planned_as": BASE,
    }
    for part in (derived, base):
        part.pop("plans_name")
        part["lgssl"].pop("schedule")
    derived["lgssl"].pop("training")
    assert derived == base  # the same data_identifier above all


def test_options_on_derived_plans_add_up(derive):
    once = derive(hyperparameters={"dropout": "0.1"})
    twice = derive(once, seed=3, hyperparameters={"ramp_fraction": "0.2"})
    assert twice["plans_name"] == f"{BASE}_dropout-0.1_s3_ramp_fraction-0.2"
    assert twice["lgssl"]["training"]["hyperparameters"] == {"dropout": 0.1, "ramp_fraction": 0.2}
    assert twice["lgssl"]["training"]["planned_as"] == BASE
    assert derive(once, hyperparameters={"dropout": "0.1"}) is once


def test_going_back_to_a_default_on_derived_plans_is_a_difference(derive):
    once = derive(hyperparameters={"dropout": "0.1"}, seed=1)
    back = derive(once, hyperparameters={"dropout": "0.5"}, seed=0)
    assert back["lgssl"]["training"]["hyperparameters"]["dropout"] == 0.5
    assert back["lgssl"]["training"]["seed"] == 0
    assert back["plans_name"] not in (once["plans_name"], BASE)


@pytest.mark.parametrize("option", ["epochs", "iterations_per_epoch", "unlabeled_batch_size"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(option, value, derive):
    with pytest.raises(UsageError, match=f"--{option} must be at least 1, not {value}"):
        derive(**{option: value})


def test_a_negative_seed_is_refused(derive):
    with pytest.raises(UsageError, match="--seed must be at least 0, not -1"):
        derive(seed=-1)


def test_unknown_hyperparameters_are_refused(derive):
    with pytest.raises(UsageError, match="'ramp_fracton' is unknown"):
        derive(hyperparameters={"ramp_fracton": "1"})
    with pytest.raises(UsageError, match="takes no hyper-parameters"):
        derive(trainer="nnUNetTrainer", hyperparameters={"weight": "1"})
    with pytest.raises(UsageError, match="It has none: leave them out"):
        derive(trainer="SupervisedTrainer", hyperparameters={"weight": "1"})


def test_a_method_without_unlabelled_patches_takes_no_number_of_them(derive):
    with pytest.raises(UsageError, match="SupervisedTrainer has no unlabelled patches: leave out --unlabeled_batch_si"):
        derive(trainer="SupervisedTrainer", unlabeled_batch_size=2)


def test_nnunets_own_plans_cannot_carry_options(derive, tiny_dataset):
    plans = tiny_dataset().plans()
    del plans["lgssl"]
    assert derive(plans, trainer="nnUNetTrainer") is plans
    with pytest.raises(PlansError, match="cannot carry these options"):
        derive(plans, trainer="nnUNetTrainer", epochs=3)


def test_training_as_planned_writes_no_plans(dataset, train_tiny, without_training):
    before = sorted(dataset.preprocessed.glob("*.json"))
    folder = train_tiny(trainer="LGSSLTrainer")
    assert folder.name == f"LGSSLTrainer__{BASE}__3d_fullres"
    assert sorted(dataset.preprocessed.glob("*.json")) == before


def test_every_run_has_a_folder_of_its_own(dataset, train_tiny, without_training):
    base = dataset.plans_file.read_bytes()
    folders = [train_tiny(trainer="LGSSLTrainer", **options) for options in OPTIONS.values()]
    assert all(a != b for a, b in itertools.combinations(folders, 2))
    assert dataset.plans_file.read_bytes() == base
    for folder in folders:
        name = folder.name.split("__")[1]
        assert json.loads((dataset.preprocessed / f"{name}.json").read_text())["plans_name"] == name


def test_the_trainer_obeys_the_options(train_tiny, without_training):
    train_tiny(trainer="LGSSLTrainer", epochs=7, iterations_per_epoch=5, seed=3, hyperparameters={"dropout": "0.25"})
    trainer = without_training.trainer
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.seed) == (7, 5, 3)
    assert trainer.hp.dropout == 0.25


def test_a_refused_run_leaves_no_plans_behind(dataset, train_tiny):
    before = sorted(dataset.preprocessed.glob("*.json"))
    with pytest.raises(UsageError, match="pairs every labelled with an unlabelled patch"):
        train_tiny(trainer="LGSSLTrainer", unlabeled_batch_size=7)
    assert sorted(dataset.preprocessed.glob("*.json")) == before


def test_the_fingerprint_of_the_plans_follows_a_derived_run(dataset, train_tiny):
    folder = train_tiny(epochs=1, iterations_per_epoch=1)
    fingerprint = dataset.preprocessed / f"dataset_fingerprint_{BASE}.json"
    assert (folder / "dataset_fingerprint.json").read_bytes() == fingerprint.read_bytes()


def test_two_seeds_end_in_two_models_beside_each_other(dataset, same):
    import torch

    def weights(seed: int):
        folder = train(901, trainer="SupervisedTrainer", epochs=1, seed=seed, device="cpu", progress=False)
        return folder, torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=False)["network_weights"]

    (first_folder, first), (second_folder, second) = weights(1), weights(2)
    assert first_folder != second_folder
    assert not same(first, second)


def test_another_text_encoder_changes_the_vectors_and_nothing_else(derive, tiny_dataset, tmp_path):
    plans = tiny_dataset().plans()
    prompts = plans["lgssl"]["text"]["prompts"]
    vectors = np.eye(len(prompts), 7, dtype=np.float32)
    bank = tmp_path / "bank.npz"
    EmbeddingBank(tuple(prompts), vectors, "unit vectors", "0" * 64).save(bank)
    derived = derive(plans, hyperparameters={"text_encoder": f"file:{bank}"})
    text = derived["lgssl"]["text"]
    assert text["embeddings"] == vectors.tolist()
    assert text["prompts"] == prompts
    assert "unit vectors" in text["encoder"]
    assert plans == tiny_dataset().plans()
    same = {key: value for key, value in derived["lgssl"].items() if key not in ("text", "training")}
    assert same == {key: value for key, value in plans["lgssl"].items() if key not in ("text", "training")}
    assert derived["configurations"] == plans["configurations"]


@pytest.mark.parametrize("block", [{"templates": ["A {}"]}, {"several_texts": {"liver": ["a", "b"]}}])
def test_averaged_texts_are_not_embedded_again(block, derive, tiny_dataset):
    plans = tiny_dataset().plans()
    plans["lgssl"]["text"] |= block
    with pytest.raises(PromptError, match=r"plan with --text_encoder file:x\.npz"):
        derive(plans, hyperparameters={"text_encoder": "file:x.npz"})


def test_a_missing_text_encoder_is_refused_before_anything_is_written(derive):
    with pytest.raises(PromptError, match=r"none\.npz"):
        derive(hyperparameters={"text_encoder": "file:none.npz"})


@pytest.mark.parametrize(
    ("encoder", "tag"),
    [
        ("bank", "bank"),
        ("file:bank.npz", "file-bank.npz"),
        ("file:/data/Erika Muster/bank.npz", "file-bank.npz-"),
        ("hf:/data/Erika Muster/biobert", "hf-biobert-"),
        ("ViT-B-32/openai", "openai-"),
    ],
)
def test_the_name_tells_the_encoder_without_the_folders_of_its_path(encoder, tag, tiny_dataset):
    options = (None, None, None, None, {"text_encoder": encoder})
    name = derive_plans(tiny_dataset().plans(), find_trainer("LGSSLTrainer"), *options)["plans_name"]
    assert name.startswith(f"{BASE}_text_encoder-{tag}")
    assert "Muster" not in name


def test_two_banks_of_one_name_are_two_trainings(tiny_dataset):
    names = {
        derive_plans(
            tiny_dataset().plans(), find_trainer("LGSSLTrainer"), None, None, None, None, {"text_encoder": encoder}
        )["plans_name"]
        for encoder in ("file:bank.npz", "file:/a/bank.npz", "file:/b/bank.npz", "hf:/a/bank.npz")
    }
    assert len(names) == 4


def test_a_begun_model_keeps_its_vectors_and_needs_no_encoder(derive, tiny_dataset, tmp_path):
    plans = tiny_dataset().plans()
    bank = tmp_path / "bank.npz"
    prompts = tuple(plans["lgssl"]["text"]["prompts"])
    EmbeddingBank(prompts, np.eye(len(prompts), 7, dtype=np.float32), "unit vectors", "0" * 64).save(bank)
    options = {"hyperparameters": {"text_encoder": f"file:{bank}"}, "model": tmp_path / "model"}
    first = derive(plans, **options)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "plans.json").write_text(json.dumps(first))
    bank.unlink()
    assert derive(plans, **options) == first
    plans["lgssl"]["schedule"]["initial_lr"] = 0.5
    with pytest.raises(PromptError, match="does not exist"):
        derive(plans, **options)


def test_stored_prompts_are_found_by_their_phrase_as_planning_finds_them(derive, tiny_dataset, tmp_path):
    plans = tiny_dataset().plans()
    sentences = ["A computerized tomography of a background", "A computerized tomography of a postcava"]
    plans["lgssl"]["text"]["prompts"] = sentences
    bank = tmp_path / "bank.npz"
    EmbeddingBank(("background", "postcava"), np.eye(2, dtype=np.float32), "phrases", "0" * 64).save(bank)
    text = derive(plans, hyperparameters={"text_encoder": f"file:{bank}"})["lgssl"]["text"]
    assert text["embeddings"] == np.eye(2).tolist()
    shipped = derive(plans, hyperparameters={"text_encoder": "bank"})["lgssl"]["text"]
    assert shipped["prompts"][1] != sentences[1]


def test_plans_without_text_and_plans_of_another_encoder_say_what_to_do(derive, tiny_dataset, tmp_path):
    plans = tiny_dataset().plans()
    plans["lgssl"]["training"] = {"hyperparameters": {"text_encoder": "file:x.npz"}, "planned_as": BASE}
    with pytest.raises(PromptError, match=f"-p {BASE}"):
        derive(plans, hyperparameters={"text_encoder": "planned"})
    plans = tiny_dataset().plans()
    del plans["lgssl"]["text"]
    with pytest.raises(PromptError, match="hold no prompts"):
        derive(plans, hyperparameters={"text_encoder": "bank"})


def test_a_note_of_sides_that_planning_has_learned_since_does_not_stop_a_training(derive):
    stored = derive(seed=1)
    now, other = ({**stored, "lgssl": {**stored["lgssl"], "left_right": {"axis": 2, "sign": s}}} for s in (1, -1))
    assert are_of_one_training(stored, now)
    assert not are_of_one_training(other, now)
    assert not are_of_one_training(now, stored)
    assert not any(are_of_one_training(damaged, now) for damaged in (None, [1], "plans"))
    assert not are_of_one_training({**stored, "plans_name": "Another"}, now)
