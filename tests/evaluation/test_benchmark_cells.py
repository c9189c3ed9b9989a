"""What identifies a cell of a benchmark, and which cells a command asks for."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.evaluation.benchmark.cell_steps import divide_iterations
from lgssl_nnunet.evaluation.benchmark.cells import Cell, cell_from_identity, method_label, parse_method
from lgssl_nnunet.evaluation.benchmark.grid import GridRequest, build_grid

CELL = Cell("Dataset901_Phantom", "LGSSLTrainer", 4, 1, 1000, "3d_fullres", "LGSSLPlannerCPU")
CHANGES = {
    "dataset": "Dataset902_Phantom",
    "trainer": "SupervisedTrainer",
    "budget": None,
    "seed": 2,
    "iterations": 2000,
    "configuration": "2d",
    "planner": "LGSSLPlanner",
    "spacing": (1.25, 1.25, 1.25),
    "settings": (("prompt_mode", "none"),),
}


@pytest.mark.parametrize("field", [*CHANGES, None])
def test_a_cell_is_the_same_after_it_was_written_and_read(field):
    cell = dataclasses.replace(CELL, **({field: CHANGES[field]} if field else {}))
    assert cell_from_identity(json.loads(json.dumps(cell.identity()))) == cell


def test_cells_that_differ_in_anything_have_different_names():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Cell)}
    names = {dataclasses.replace(CELL, **{field: value}).name for field, value in CHANGES.items()}
    assert len(names | {CELL.name}) == len(CHANGES) + 1


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("LGSSLTrainer", {}),
        ("LGSSLTrainer:prompt_mode=none", {"prompt_mode": "none"}),
        ("LGSSLTrainer:prompt_mode=none,dropout=0", {"prompt_mode": "none", "dropout": 0.0}),
    ],
)
def test_a_method_is_a_trainer_with_its_settings(word, settings):
    assert parse_method(word) == ("LGSSLTrainer", settings)
    assert parse_method(method_label("LGSSLTrainer", settings)) == ("LGSSLTrainer", settings)


def test_a_setting_at_its_default_changes_nothing():
    from lgssl_nnunet.registry import find_trainer

    default = find_trainer("LGSSLTrainer").hyperparameters.dropout
    assert parse_method(f"LGSSLTrainer:dropout={default}") == ("LGSSLTrainer", {})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("LGSLTrainer", "did you mean LGSSLTrainer"),
        ("LGSSLTrainer:dropot=0", "'dropot' is unknown"),
        ("LGSSLTrainer:dropout", "NAME=VALUE"),
        ("SupervisedTrainer:dropout=0", "'dropout' is unknown"),
        ("nnUNetTrainer", "take SupervisedTrainer"),
    ],
)
def test_other_methods_are_refused(word, message):
    with pytest.raises(UsageError, match=message):
        parse_method(word)


@pytest.mark.parametrize(
    ("iterations", "planned", "divided"),
    [
        (1000, 50, (20, 50)),  # as planned
        (2000, 50, (40, 50)),
        (2, 50, (1, 2)),
        (1000, 250, (4, 250)),
        (110, 50, (2, 55)),
        (1009, 50, (1, 1009)),  # a prime: epochs of one step are farther from 50 than one epoch
        (250_000, 250, (1000, 250)),
    ],
)
def test_iterations_are_divided_into_epochs_without_a_remainder(iterations, planned, divided):
    assert divide_iterations(iterations, {"iterations_per_epoch": planned}) == divided


# ----------------------------------------------------------------------------------------------------------- the grid


@pytest.fixture
def raw(tmp_path, new_phantom, monkeypatch):
    """A phantom of 6 labelled, 4 unlabelled and 2 test cases."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    return new_phantom(tmp_path)


@pytest.fixture
def all_labeled(raw):
    """The phantom without its unlabelled cases."""
    for file in raw.glob("image*/unlabeled*"):
        file.unlink()
    return raw


def grid(**changes) -> list[Cell]:
    request = {
        "datasets": [901],
        "trainers": ["SupervisedTrainer", "LGSSLTrainer"],
        "budgets": [2],
        "seeds": [0],
        "iterations": None,
        "configuration": "3d_fullres",
        "planner": "LGSSLPlannerCPU",
        "spacing": None,
    }
    return build_grid(GridRequest(**(request | changes)))


def shown(cells: list[Cell]) -> list[tuple]:
    return [(cell.seed, cell.budget, cell.method) for cell in cells]


def test_cells_come_seed_by_seed_and_budgets_ascend(raw):
    assert shown(grid(budgets=["4", 2], seeds=[0, 1], trainers=["LGSSLTrainer", "SupervisedTrainer"])) == [
        (seed, budget, trainer)
        for seed in (0, 1)
        for budget in (2, 4)
        for trainer in ("LGSSLTrainer", "SupervisedTrainer")
    ]


def test_iterations_that_are_not_given_are_the_planned_ones(raw):
    assert {cell.iterations for cell in grid()} == {1000}
    assert grid(iterations=1000) == grid()


def test_with_all_labels_the_baseline_trains_and_the_others_only_where_images_without_labels_are_left(all_labeled):
    assert shown(grid(budgets=["all"])) == [(0, None, "SupervisedTrainer")]
    assert shown(grid(budgets=[6])) == [(0, 6, "SupervisedTrainer")]


def test_methods_with_all_labels_train_where_the_dataset_has_unlabelled_cases(raw):
    assert shown(grid(budgets=["all"])) == [(0, None, "SupervisedTrainer"), (0, None, "LGSSLTrainer")]


def test_cases_that_leave_a_class_open_are_unlabelled_cases_too(all_labeled):
    content = json.loads((all_labeled / "dataset.json").read_text())
    first = sorted(file.name.split(".")[0] for file in (all_labeled / "labelsTr").iterdir())[0]
    content["annotated"] = {first: [next(name for name in content["labels"] if name != "background")]}
    (all_labeled / "dataset.json").write_text(json.dumps(content))
    assert shown(grid(budgets=["all"])) == [(0, None, "SupervisedTrainer"), (0, None, "LGSSLTrainer")]


def test_budgets_and_trainers_that_partly_annotated_cases_rule_out_are_told_before_any_training(all_labeled):
    content = json.loads((all_labeled / "dataset.json").read_text())
    cases = sorted(file.name.split(".")[0] for file in (all_labeled / "labelsTr").iterdir())
    first, second = (name for name in content["labels"] if name != "background")
    content["annotated"] = {case: [first] for case in cases[1:]} | {cases[0]: [second]}
    (all_labeled / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UsageError) as error:
        grid(budgets=[1, 6], seeds=[0, 1], trainers=["LGSSLTrainer", "UAMTTrainer"])
    message = str(error.value)
    assert message.count("none of the 1 labelled cases of this budget annotates") == 1
    assert "seed 0: Dataset901_Phantom: none of the 1 labelled" in message
    assert "annotate only some of the classes, which UAMTTrainer cannot learn from; leave out" in message
    assert shown(grid(budgets=[6])) == [(0, 6, "SupervisedTrainer"), (0, 6, "LGSSLTrainer")]


def test_the_upper_bound_is_there_without_being_named(all_labeled):
    methods = shown(grid(budgets=["all", 2], trainers=["LGSSLTrainer"]))
    assert methods == [(0, 2, "LGSSLTrainer"), (0, None, "SupervisedTrainer")]


def test_a_method_that_learns_from_another_model_comes_after_it(raw):
    methods = [cell.method for cell in grid(trainers=["PseudoLabelTrainer", "SupervisedTrainer", "LGSSLTrainer"])]
    assert methods == ["SupervisedTrainer", "LGSSLTrainer", "PseudoLabelTrainer"]


def test_variants_of_a_method_are_cells_of_their_own(raw):
    assert len(set(grid(trainers=["LGSSLTrainer", "LGSSLTrainer:prompt_mode=none"]))) == 2


def test_a_dataset_without_test_images_or_references_is_refused_with_the_remedy(raw):
    shutil.rmtree(raw / "labelsTs")
    with pytest.raises(UsageError, match=r"labelsTs holds nothing; a benchmark needs test cases .* move some labelled"):
        grid()
    shutil.rmtree(raw / "imagesTs")
    with pytest.raises(UsageError, match="imagesTs holds nothing"):
        grid()


def test_a_test_image_without_its_reference_is_named_and_a_reference_without_its_image(raw):
    first, second = sorted((raw / "labelsTs").iterdir())
    first.unlink()
    shutil.copy(second, raw / "labelsTs" / "stranger.nii.gz")
    with pytest.raises(UsageError) as refusal:
        grid()
    assert f"labelsTs lacks {first.name.removesuffix('.nii.gz')};" in str(refusal.value)
    assert "imagesTs lacks stranger, which labelsTs has" in str(refusal.value)


def test_a_test_case_that_is_also_in_training_is_refused(raw):
    image = sorted((raw / "imagesTs").iterdir())[0]
    shutil.copy(image, raw / "imagesTr" / image.name)
    with pytest.raises(UsageError, match="are in imagesTs and in training"):
        grid()


def test_everything_that_is_wrong_is_said_at_once(raw):
    with pytest.raises(UsageError) as refusal:
        grid(
            datasets=[901, 999],
            trainers=["LGSLTrainer", "SupervisedTrainer", "SupervisedTrainer"],
            budgets=[0, 7, "many"],
            seeds=[1, 1],
            iterations=0,
            configuration="3d_cascade_fullres",
            planner="Planner",
            spacing=(1.0, 0.0, 1.0),
        )
    for words in (
        "No dataset 999", "did you mean LGSSLTrainer", "--trainers: give one or more methods, each once",
        "--budgets 0 7 many", "--labeled 7: Dataset901_Phantom has only 6", "--seeds", "--iterations 0",
        "-c 3d_cascade_fullres", "Planner", "--overwrite_target_spacing",
    ):  # fmt: skip
        assert words in str(refusal.value)
