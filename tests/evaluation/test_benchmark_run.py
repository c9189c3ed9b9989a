"""Real cells on a tiny phantom: what each step reads, what is taken over, and what the tables say in the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from lgssl_nnunet import training
from lgssl_nnunet.evaluation.benchmark import cell_steps
from lgssl_nnunet.evaluation.benchmark.benchmark import benchmark
from lgssl_nnunet.evaluation.benchmark.results import load_results

pytestmark = pytest.mark.slow
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
METHODS = ["SupervisedTrainer", "MeanTeacherTrainer"]
STEPS = {
    "plan": "plan",
    "train": "train_or_adopt",
    "predict": "predict_test_cases",
    "evaluate": "evaluate_test_cases",
}


def run(*trainers: str, iterations: int = 2):
    return benchmark(
        [901], trainers or METHODS, [2], [1],
        iterations=iterations, planner="LGSSLPlannerCPU", workers=0, num_processes=0, device="cpu", progress=False,
        command="lgssl_benchmark -d 901",
    )  # fmt: skip


def watch(patch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Record which folders each step reads images from, and with what `train` is called."""
    seen = SimpleNamespace(step=None, reads=set(), trainings=[])

    def before(owner: object, function: str, note) -> None:
        original = getattr(owner, function)

        def noted(*arguments, **options):
            note(arguments, options)
            return original(*arguments, **options)

        patch.setattr(owner, function, noted)

    def note_file(position: int):
        def note(arguments, options) -> None:
            named = arguments[position] if len(arguments) > position else next(iter(options.values()))
            files = named if isinstance(named, (list, tuple)) else [named]
            seen.reads.update((seen.step, Path(file).parent.name) for file in files)

        return note

    for step, function in STEPS.items():
        before(cell_steps, function, lambda arguments, options, step=step: setattr(seen, "step", step))
    before(SimpleITKIO, "read_images", note_file(1))
    before(SimpleITKIO, "read_seg", note_file(1))
    before(sitk, "ReadImage", note_file(0))
    before(sitk.ImageFileReader, "SetFileName", note_file(1))
    before(training, "train", lambda *call: seen.trainings.append(call))
    return seen


def point_to(patch: pytest.MonkeyPatch, root: Path) -> None:
    for variable in FOLDERS:
        patch.setenv(variable, str(root / variable))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, new_phantom) -> SimpleNamespace:
    """A benchmark of two methods with two labels, and what its steps did."""
    root = tmp_path_factory.mktemp("benchmark")
    new_phantom(root)
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, root)
        seen = watch(patch)
        result = run()
    return SimpleNamespace(root=root, result=result, seen=seen)


@pytest.fixture
def again(finished, tmp_path, monkeypatch) -> SimpleNamespace:
    """A copy of it that a test may change; watched anew."""
    shutil.copytree(finished.root, tmp_path, dirs_exist_ok=True)
    point_to(monkeypatch, tmp_path)
    return SimpleNamespace(root=tmp_path, seen=watch(monkeypatch))


def records(root: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(root.glob("nnUNet_results/benchmark/cells/*/cell.json"))]


def test_every_cell_ends_with_tables_and_nothing_is_left_undone(finished):
    assert finished.result.unfinished == {}
    assert {file.name for file in finished.result.files.values()} <= {
        file.name for file in finished.result.folder.iterdir()
    }
    table = pd.read_csv(finished.result.files["results_per_case.csv"])
    assert sorted(set(table["method"])) == sorted(METHODS)
    assert len(table) == len(METHODS) * 2 * 2  # two test cases, two classes


def test_dice_is_that_of_the_evaluation(finished):
    cells = load_results(finished.result.folder).cells
    recorded = [record["dice"] for record in records(finished.root)]
    assert cells["dice"].tolist() == pytest.approx(recorded, abs=1e-12)


def test_test_cases_are_read_by_prediction_and_evaluation_and_images_by_the_search_for_twins_only(finished):
    reads = finished.seen.reads
    assert {step for step, folder in reads if folder == "labelsTs"} == {"evaluate"}
    assert {step for step, folder in reads if folder == "imagesTs"} <= {"plan", "predict"}
    assert {folder for step, folder in reads if step == "predict"} == {"imagesTs"}
    assert ("plan", "labelsTr") in reads


def test_the_model_is_the_last_checkpoint_on_all_labelled_cases(finished):
    for file in finished.root.glob("nnUNet_results/benchmark/cells/*/prediction/lgssl_prediction.json"):
        model = json.loads(file.read_text())["model"]
        assert (model["checkpoint"], model["folds"]) == ("checkpoint_final.pth", ["all"])


def test_methods_train_alike_on_the_same_labelled_cases(finished):
    (first, options), (second, other_options) = finished.seen.trainings
    assert [arguments[2] for arguments in (first, second)] == METHODS
    assert options == other_options
    assert options["seed"] == 1
    assert options["epochs"] * options["iterations_per_epoch"] == 2
    draws = {tuple(record["labeled"]) for record in records(finished.root)}
    assert {len(draw) for draw in draws} == {2}
    assert len(draws) == 1


def test_the_seed_draws_the_cases_and_is_in_the_name_of_the_model(finished):
    plans = "LGSSLCPUPlans_labeled2_s1_e1_i2_s1__3d_fullres"
    names = {f"{method}__{plans}" for method in METHODS}
    assert names == {path.name for path in finished.root.glob("nnUNet_results/Dataset901_Phantom/[!.]*")}


def test_a_second_call_does_nothing(again):
    assert run().unfinished == {}
    assert again.seen.step is None


def test_a_finished_model_is_taken_over_and_not_trained_again(again):
    shutil.rmtree(again.root / "nnUNet_results" / "benchmark")
    assert run("SupervisedTrainer").unfinished == {}
    assert again.seen.trainings == []
    (record,) = records(again.root)
    assert record["adopted"]
    assert record["training_seconds"] > 0
    assert (
        "1 of the 1 models were trained before"
        in (again.root / "nnUNet_results" / "benchmark" / "results.md").read_text()
    )


def test_predictions_that_are_damaged_are_made_again_from_the_same_model(again, finished):
    (file,) = again.root.glob("nnUNet_results/benchmark/cells/*SupervisedTrainer*/prediction/test_000.nii.gz")
    whole = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    file.write_bytes(b"")
    assert run().unfinished == {}
    assert again.seen.trainings == []
    assert (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) == whole).all()


def test_a_model_of_other_plans_fails_its_cell_with_the_remedy_and_is_left_alone(again):
    (folder,) = again.root.glob("nnUNet_results/Dataset901_Phantom/SupervisedTrainer*")
    plans = json.loads((folder / "plans.json").read_text())
    plans["lgssl"]["split"]["labeled"] = ["other"]
    (folder / "plans.json").write_text(json.dumps(plans))
    shutil.rmtree(again.root / "nnUNet_results" / "benchmark")
    result = run("SupervisedTrainer")
    (reason,) = result.unfinished.values()
    assert "Move the model folder away to train again" in reason
    assert reason.startswith("$nnUNet_results/Dataset901_Phantom")  # no path of this machine in what is handed on
    assert (folder / "fold_all" / "checkpoint_final.pth").is_file()


def test_an_interrupted_training_is_continued(again, monkeypatch):
    shutil.rmtree(again.root / "nnUNet_results" / "benchmark")
    (fold,) = again.root.glob("nnUNet_results/Dataset901_Phantom/SupervisedTrainer*/fold_all")
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    seen = {}

    def finish(*arguments, **options):
        seen.update(options)
        (fold / "checkpoint_latest.pth").rename(fold / "checkpoint_final.pth")

    monkeypatch.setattr(training, "train", finish)
    assert run("SupervisedTrainer").unfinished == {}
    assert seen["continue_training"]
    assert not records(again.root)[0]["adopted"]
