"""What a round of PseudoLabelTrainer finds, writes, keeps and learns from."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch

from lgssl_nnunet.data.views import ViewsTransform
from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.inference import pseudo_labels
from lgssl_nnunet.inference.models import FINAL_CHECKPOINT
from lgssl_nnunet.inference.pseudo_labels import models_of_same_data
from lgssl_nnunet.installation import ext_trainer_path
from lgssl_nnunet.training import train

NAME = "PseudoLabelTrainer"
CASES = [f"unlabeled_{number:03d}" for number in range(4)]


def options(**hyperparameters) -> dict:
    return {"training": {"seed": 0, "hyperparameters": hyperparameters}}


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file in a folder."""
    return {
        str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def read(file: Path) -> np.ndarray:
    return blosc2.open(str(file), mode="r")[:]


def speak_up(model: Path) -> None:
    """Scale the last layer, so that a network of four steps predicts more than one class."""
    file = next(model.glob(f"fold_*/{FINAL_CHECKPOINT}"))
    content = torch.load(file, weights_only=False)
    heads = [name for name in content["network_weights"] if name.startswith("decoder.seg_layers.")]
    content["network_weights"][max(name for name in heads if name.endswith("weight"))].mul_(50)
    torch.save(content, file)


def another_run(model: Path, name: str, age: int = 0, **lgssl) -> Path:
    """Copy a model as that of a run with other options, finished `age` seconds earlier."""
    trainer, plans_name, configuration = model.name.split("__")
    copy = model.with_name(f"{trainer}__{name}__{configuration}")
    shutil.copytree(model, copy)
    plans = json.loads((copy / "plans.json").read_text())
    plans["plans_name"] = name
    plans["lgssl"] |= {"training": {"seed": 0, "planned_as": plans_name}, **lgssl}
    (copy / "plans.json").write_text(json.dumps(plans))
    for file in copy.glob(f"fold_*/{FINAL_CHECKPOINT}"):
        time = file.stat().st_mtime_ns - age * 10**9
        os.utime(file, ns=(time, time))
    return copy


@pytest.fixture
def source(train_source, tmp_path):
    """A results folder with a finished SupervisedTrainer, and its model folder."""

    def make(**settings) -> Path:
        train_source(tmp_path, **settings)
        (model,) = tmp_path.glob("*/SupervisedTrainer__*")
        speak_up(model)
        return model

    return make


@pytest.fixture
def of_round(started, tmp_path):
    """The trainer that has labelled its cases in the results folder of `source`."""
    return lambda **settings: started(NAME, results=tmp_path, **settings)


# ------------------------------------------------------------------------------------------------------- the source


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({}, "lgssl_train 901 3d_fullres SupervisedTrainer -p LGSSLCPUPlans."),
        ({"fold": 2, "configuration": "2d"}, "lgssl_train 901 2d SupervisedTrainer -p LGSSLCPUPlans -f 2."),
        ({"training": {"seed": 3}}, "SupervisedTrainer -p LGSSLCPUPlans --seed 3."),
        ({"training": {"seed": 0, "planned_as": "Stem"}}, "SupervisedTrainer -p Stem."),
        (options(source="MeanTeacherTrainer"), "MeanTeacherTrainer -p LGSSLCPUPlans."),
        (options(source=NAME), "PseudoLabelTrainer -p LGSSLCPUPlans."),
        (options(source=NAME, round=3), "PseudoLabelTrainer -p LGSSLCPUPlans --set source=PseudoLabelTrainer."),
        (options(source=NAME, round=4), "--set source=PseudoLabelTrainer --set round=3."),
    ],
)
def test_without_a_finished_source_it_refuses_with_the_command_that_makes_one(
    settings, command, build_trainer, tmp_path
):
    with pytest.raises(CheckpointError, match=r"needs a finished .* train it first with lgssl_train") as caught:
        build_trainer(NAME, results=tmp_path, **settings)
    assert str(caught.value).endswith(command)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"source": "SupervizedTrainer"}, "source=SupervizedTrainer is no trainer of this package"),
        ({"round": 3}, "round=3 needs the model of the round before: add source=PseudoLabelTrainer"),
        ({"source": NAME, "round": 1}, "round=1 must be at least 2"),
        ({"pseudo_weight": -1}, "pseudo_weight"),
    ],
)
def test_values_that_make_no_sense_are_refused(values, problem, build_trainer, tmp_path):
    with pytest.raises(UsageError, match=problem):
        build_trainer(NAME, results=tmp_path, **options(**values))
    assert not list(tmp_path.iterdir())


def test_an_unfinished_training_is_no_source(source, build_trainer, tmp_path):
    checkpoint = source() / "fold_all" / FINAL_CHECKPOINT
    checkpoint.rename(checkpoint.with_name("checkpoint_latest.pth"))
    with pytest.raises(CheckpointError, match="needs a finished"):
        build_trainer(NAME, results=tmp_path)


def test_of_several_sources_the_longest_trained_comes_first_even_if_it_is_the_oldest(source):
    newest = source()
    oldest = another_run(newest, "LGSSLCPUPlans_e9", age=20)
    plans = json.loads((oldest / "plans.json").read_text())
    plans["lgssl"]["schedule"]["iterations_per_epoch"] += 1
    (oldest / "plans.json").write_text(json.dumps(plans))
    found = models_of_same_data(newest.parent, "SupervisedTrainer", plans, "3d_fullres", "all")
    assert [model.folder for model in found] == [oldest, newest]


def test_sources_trained_equally_long_are_sorted_by_age_whatever_their_options_and_names(source):
    newest = source()
    oldest = another_run(newest, "LGSSLCPUPlans_e9", age=20)
    between = another_run(newest, "LGSSLCPUPlans_i9", age=10)
    plans = json.loads((newest / "plans.json").read_text())
    found = models_of_same_data(newest.parent, "SupervisedTrainer", plans, "3d_fullres", "all")
    assert [model.folder for model in found] == [newest, between, oldest]


def test_a_model_of_other_cases_seed_fold_or_configuration_is_no_source(source, tiny_dataset):
    model = source()
    plans = json.loads((model / "plans.json").read_text())

    def found(plans: dict, configuration: str = "3d_fullres", fold: int | str = "all") -> int:
        return len(models_of_same_data(model.parent, "SupervisedTrainer", plans, configuration, fold))

    assert found(plans) == 1
    assert found(plans, configuration="2d") == 0
    assert found(plans, fold=0) == 0
    split, training = plans["lgssl"]["split"], {"seed": 1}
    fewer = {**split, "labeled": split["labeled"][1:], "unlabeled": [*split["unlabeled"], split["labeled"][0]]}
    assert found({**plans, "lgssl": {**plans["lgssl"], "split": fewer}}) == 0
    assert found({**plans, "lgssl": {**plans["lgssl"], "training": training}}) == 0
    assert found({**plans, "plans_name": "OtherPlans"}) == 0
    longer = {**plans["lgssl"]["schedule"], "num_epochs": 9}
    assert found({**plans, "lgssl": {**plans["lgssl"], "schedule": longer}}) == 1


def test_the_newest_source_is_recorded_with_its_checkpoint_and_logged(source, of_round, caplog):
    older = source()
    newer = another_run(older, "LGSSLCPUPlans_e9", age=-10)
    with caplog.at_level("INFO", logger=pseudo_labels.__name__):
        trainer = of_round()
    assert f"Of 2 finished models that fit, {newer} is the longest trained and newest" in caplog.text
    record = json.loads((trainer.label_folder / "source.json").read_text())
    assert record.pop("sha256") != ""
    assert record == {"model": newer.name, "fold": "all", "checkpoint": FINAL_CHECKPOINT}


def test_a_run_goes_on_with_the_source_it_began_with_although_there_is_a_newer_one(source, of_round):
    model = source()
    before = contents(of_round().label_folder)
    another_run(model, "LGSSLCPUPlans_e9", age=-10)
    assert contents(of_round().label_folder) == before


@pytest.mark.parametrize("change", ["trained anew", "gone"])
def test_a_run_does_not_go_on_with_another_source(change, source, of_round, build_trainer, tmp_path):
    model = source()
    before = contents(of_round().label_folder)
    if change == "gone":
        shutil.rmtree(model)
    else:
        another_run(model, "LGSSLCPUPlans_e9")
        speak_up(model)
    run = build_trainer(NAME, results=tmp_path)  # which can validate what is there
    with pytest.raises(CheckpointError, match=f"{model.name}, which is no longer there as it was: put it back"):
        run.on_train_start()
    assert contents(run.label_folder) == before


# ------------------------------------------------------------------------------------------------- the pseudo-labels


@pytest.mark.parametrize("variant", ["standard", "regions", "regions_and_ignore", "ignore", "two_channels"])
def test_pseudo_labels_are_what_stock_nnunet_predicts_with_the_source_model(
    variant, source, of_round, tiny_dataset, monkeypatch
):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    monkeypatch.setenv("nnUNet_extTrainer", str(ext_trainer_path()))
    model = source(variant=variant)
    trainer = of_round(variant=variant)
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(model), ("all",), FINAL_CHECKPOINT)
    assert stock.allowed_mirroring_axes == (0, 1, 2)
    seen = set()
    for case in CASES:
        image = torch.from_numpy(read(trainer.unlabeled_folder / f"{case}.b2nd"))
        expected = stock.label_manager.convert_logits_to_segmentation(
            stock.predict_logits_from_preprocessed_data(image)
        )
        found = read(trainer.label_folder / f"{case}.b2nd")
        assert np.array_equal(found, expected.numpy()[None])
        seen |= set(np.unique(found).tolist())
    assert len(seen) > 1


def test_files_are_written_into_the_fold_and_nowhere_else(source, of_round, tiny_dataset, tmp_path):
    source()
    dataset = tiny_dataset()
    before = contents(dataset.root)
    trainer = of_round()
    assert contents(dataset.root) == before
    assert trainer.label_folder == Path(trainer.output_folder) / "pseudo_labels"
    expected = {"source.json", *(f"{case}{ending}" for case in CASES for ending in (".b2nd", ".pkl"))}
    assert {file.name for file in trainer.label_folder.iterdir()} == expected


def test_a_run_killed_while_labelling_keeps_what_is_finished_and_does_the_rest(
    source, build_trainer, of_round, tmp_path, monkeypatch, same
):
    source()
    predicted = []
    original = pseudo_labels._label_map

    def predict(*arguments):
        if len(predicted) == 2:
            raise KeyboardInterrupt
        predicted.append(arguments)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "_label_map", predict)
        killed = build_trainer(NAME, results=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            killed.on_train_start()
    finished = contents(killed.label_folder)
    assert set(finished) == {"source.json", *(f"{case}{end}" for case in CASES[:2] for end in (".b2nd", ".pkl"))}
    monkeypatch.setattr(pseudo_labels, "_label_map", lambda *a: predicted.append(a) or original(*a))
    resumed = of_round()
    assert len(predicted) == len(CASES)
    assert contents(resumed.label_folder).items() >= finished.items()
    batch = next(resumed.dataloader_train)
    monkeypatch.setattr(pseudo_labels, "LGSSLPredictor", None)  # all are there: no network is built any more
    assert same(batch, next(of_round().dataloader_train))


def test_a_file_that_could_not_be_finished_is_not_there(source, build_trainer, tmp_path, monkeypatch):
    source()

    def write_a_part(labels, urlpath, **arguments):
        Path(urlpath).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pseudo_labels.blosc2, "asarray", write_a_part)
    trainer = build_trainer(NAME, results=tmp_path)
    with pytest.raises(OSError, match="disk full"):
        trainer.on_train_start()
    assert {file.name for file in trainer.label_folder.iterdir()} == {"source.json", f"{CASES[0]}.pkl"}


def test_a_network_that_gives_no_numbers_labels_nothing_and_is_named(source, build_trainer, tmp_path, monkeypatch):
    model = source()

    def no_numbers(predictor, image):
        return torch.full((predictor.label_manager.num_segmentation_heads, *image.shape[1:]), math.nan)

    monkeypatch.setattr(pseudo_labels.LGSSLPredictor, "predict_sliding_window_return_logits", no_numbers)
    trainer = build_trainer(NAME, results=tmp_path)
    with pytest.raises(pseudo_labels.LogitsError, match=f"{CASES[0]}: {model} gives NaN or infinity"):
        trainer.on_train_start()
    assert {file.name for file in trainer.label_folder.iterdir()} == {"source.json"}


def test_background_outside_of_the_body_is_marked_where_channels_are_normalised_inside_of_it():
    image = np.ones((3, 2, 2, 1), np.float32)
    image[0, 0], image[1, 0, 0], image[2] = 0, 0, 0
    logits = torch.zeros(2, 2, 2, 1)
    logits[1, :, 1] = 1

    def label_map(use_mask):
        predictor = SimpleNamespace(
            predict_logits_from_preprocessed_data=lambda image: logits,
            label_manager=SimpleNamespace(convert_logits_to_segmentation=lambda logits: logits.argmax(0)),
            configuration_manager=SimpleNamespace(use_mask_for_norm=use_mask),
        )
        return pseudo_labels._label_map(predictor, image)[0, :, :, 0].tolist()

    assert label_map([False, False, False]) == [[0, 1], [0, 1]]
    assert label_map([True, False, False]) == [[-1, 1], [0, 1]]
    assert label_map([False, True, True]) == [[-1, 1], [0, 1]]
    assert label_map([False, False, True]) == [[-1, 1], [-1, 1]]


def test_fold_k_labels_with_its_own_model_and_leaves_twins_of_validation_cases_out(
    train_source, of_round, tmp_path, tiny_dataset
):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    labeled = tiny_dataset().plans()["lgssl"]["split"]["labeled"]
    twin = next(iter(generate_crossval_split(sorted(labeled), seed=12345, n_splits=5)[1]["val"]))
    settings = {"fold": 1, "twins": [[twin, CASES[2]]]}
    train_source(tmp_path, **settings)
    trainer = of_round(**settings)
    assert {file.stem for file in trainer.label_folder.glob("*.b2nd")} == {*CASES} - {CASES[2]}
    assert json.loads((trainer.label_folder / "source.json").read_text())["fold"] == "1"


# ------------------------------------------------------------------------------------------------------- the training


@pytest.mark.parametrize("variant", ["standard", "regions", "regions_and_ignore", "ignore", "two_channels"])
def test_pseudo_labelled_patches_are_like_labelled_ones(variant, source, of_round, next_batches):
    source(variant=variant)
    trainer = of_round(variant=variant)
    loaders = trainer.dataloader_train.data_loader.loaders
    assert loaders["unlabeled"].transforms is loaders["labeled"].transforms
    assert not isinstance(loaders["unlabeled"].transforms, ViewsTransform)
    labeled, unlabeled = next_batches(trainer)
    assert unlabeled.strong.shape == labeled.image.shape
    assert [scale.shape for scale in unlabeled.target] == [scale.shape for scale in labeled.target]
    assert set(unlabeled.keys) <= set(CASES)


def test_the_target_of_a_patch_is_the_pseudo_label_of_the_same_voxels(source, of_round):
    source()
    trainer = of_round()
    medians = {}
    for case in CASES:  # a pseudo-label that can be told from the image
        image = read(trainer.unlabeled_folder / f"{case}.b2nd")
        file = trainer.label_folder / f"{case}.b2nd"
        file.unlink()
        medians[case] = float(np.median(image))
        blosc2.asarray((image > medians[case]).astype(np.int8), urlpath=str(file))
    trainer.on_train_start()
    loader = trainer.dataloader_train.data_loader.loaders["unlabeled"]
    loader.transforms = None
    batch = loader.generate_train_batch()
    for case, image, target in zip(batch["keys"], batch["data"], batch["target"], strict=True):
        inside = target >= 0  # not padded
        assert inside.any()
        assert torch.equal(target[inside] == 1, image[inside] > medians[case])
        assert set(target[inside].unique().tolist()) <= {0, 1}


def test_both_terms_are_nnunets_loss_and_their_weights_sum_to_one(source, of_round, next_batches, terms_of):
    source()
    for weight, expected in ((1.0, (0.5, 0.5)), (3.0, (0.25, 0.75)), (0.0, (1.0, 0.0))):
        trainer = of_round(**options(pseudo_weight=weight))
        labeled, unlabeled = next_batches(trainer)
        terms = terms_of(trainer, (labeled, unlabeled))
        assert (terms["supervised"].weight, terms["pseudo"].weight) == pytest.approx(expected)
        pairs = ((labeled.image, labeled.target, "supervised"), (unlabeled.strong, unlabeled.target, "pseudo"))
        for image, target, name in pairs:
            loss = trainer.loss(trainer.network(image), target)
            assert float(terms[name].value.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)


def test_equal_patches_give_the_gradient_of_nnunets_loss_on_them(source, of_round, next_batches, terms_of, reached):
    source()
    trainer = of_round()
    labeled, unlabeled = next_batches(trainer)
    twins = type(unlabeled)(None, labeled.image, unlabeled.keys, labeled.target)
    reached(trainer.supervised_loss(trainer.network(labeled.image), labeled.target), network=trainer.network)
    expected = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    reached(trainer.total(terms_of(trainer, (labeled, twins))), network=trainer.network)
    found = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_each_term_trains_the_whole_network(source, of_round, next_batches, terms_of, reached):
    source()
    trainer = of_round()
    terms = terms_of(trainer, next_batches(trainer))
    names = {name: reached(term.value, network=trainer.network) for name, term in terms.items()}
    assert names["pseudo"] == names["supervised"]
    assert {name.split(".")[1] for name in names["pseudo"]} == {"encoder", "decoder"}


@pytest.mark.parametrize("asked", [True, False])
def test_foreground_of_the_pseudo_labels_is_looked_for_if_asked(asked, source, of_round, tiny_dataset):
    source()
    trainer = of_round(**options(oversample_foreground=asked))
    loader = trainer.dataloader_train.data_loader.loaders["unlabeled"]
    assert [loader.get_do_oversample(row) for row in range(2)] == [False, asked]
    for case in CASES:
        labels, properties = (loader._data.load_case(case)[part] for part in (1, 3))
        for value, places in properties["class_locations"].items():
            assert all(labels[:][tuple(place)] == value for place in places[:20])
            assert len(places) == min((labels[:] == value).sum(), 10000)


# ------------------------------------------------------------------------------------------------------- further rounds


@pytest.fixture
def commands(tiny_dataset, tmp_path, monkeypatch):
    """`train` on a dataset of one's own."""
    tiny_dataset().copied_to(tmp_path)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    shared = {"device": "cpu", "progress": False, "epochs": 1, "iterations_per_epoch": 1}
    return lambda trainer, **values: train(901, "3d_fullres", trainer, hyperparameters=values, **shared)


def test_each_round_takes_the_model_of_the_round_before(commands):
    def source_of(folder: Path) -> str:
        return json.loads((folder / "fold_all" / "pseudo_labels" / "source.json").read_text())["model"]

    supervised = commands("SupervisedTrainer")
    with pytest.raises(CheckpointError, match=f"needs a finished {NAME}"):
        commands(NAME, source=NAME)
    first = commands(NAME)
    with pytest.raises(CheckpointError, match="--set source=PseudoLabelTrainer"):
        commands(NAME, source=NAME, round=3)
    second = commands(NAME, source=NAME)
    third = commands(NAME, source=NAME, round=3)
    assert len({first, second, third}) == 3
    assert [source_of(folder) for folder in (first, second, third)] == [supervised.name, first.name, second.name]
    assert all((folder / "fold_all" / FINAL_CHECKPOINT).is_file() for folder in (first, second, third))


def test_another_method_may_be_the_source(commands):
    teacher = commands("MeanTeacherTrainer")
    folder = commands(NAME, source="MeanTeacherTrainer")
    record = json.loads((folder / "fold_all" / "pseudo_labels" / "source.json").read_text())
    assert record["model"] == teacher.name
    rows = (folder / "fold_all" / "lgssl_terms.csv").read_text().splitlines()
    assert "pseudo" in rows[0].split(",")
    assert all(math.isfinite(float(value)) for value in rows[1].split(","))
