"""nnU-Net's commands on our plans and models, run for real: they take minutes together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lgssl_nnunet.installation import ext_trainer_path

pytestmark = pytest.mark.slow

COMMANDS = Path(sys.executable).parent
SECONDS = 240
ONE_CPU = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_def_n_proc": "1"}


@pytest.fixture
def run(command_workspace, tmp_path):
    """Run an installed command in the workspace and return what it printed."""

    def call(command: str, *words: object) -> str:
        environment = {**os.environ, **ONE_CPU, **command_workspace.environment}
        environment["nnUNet_extTrainer"] = str(ext_trainer_path())
        line = [str(COMMANDS / command), *map(str, words)]
        done = subprocess.run(
            line, env=environment, cwd=tmp_path, timeout=SECONDS, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    return call


@pytest.fixture
def model(command_workspace, run) -> Path:
    """The folder of a LGSSLTrainer model with fold 0, trained and validated by lgssl_train."""
    folder = command_workspace.model_folder("LGSSLTrainer")
    if not folder.is_dir():
        run("lgssl_train", 997, "3d_fullres", "LGSSLTrainer", "-f", 0, "-device", "cpu", "--no_pbar", "--npz")
    return folder


def test_lgssl_train_validates_its_fold_in_worker_processes(model):
    validation = model / "fold_0" / "validation"
    assert (validation / "summary.json").is_file()
    names = {suffix: len(list(validation.glob(f"*{suffix}"))) for suffix in (".nii.gz", ".npz", ".pkl")}
    assert names == {".nii.gz": 1, ".npz": 1, ".pkl": 1}


def test_val_repeats_the_validation_with_the_best_checkpoint(model, run):
    validation = model / "fold_0" / "validation"
    before = {file.name: file.stat().st_mtime_ns for file in validation.iterdir()}
    run("lgssl_train", 997, "3d_fullres", "-f", 0, "-device", "cpu", "--val", "--val_best", "--npz")
    assert all(file.stat().st_mtime_ns > before[file.name] for file in validation.iterdir())


def test_nnunetv2_predict_gives_the_segmentation_of_lgssl_predict_to_the_voxel(
    model, run, command_workspace, tmp_path, differing_voxels
):
    chosen = ["-d", 997, "-c", "3d_fullres", "-tr", "LGSSLTrainer", "-p", command_workspace.plans, "-f", 0]
    images = ["-i", command_workspace.test_images, "-device", "cpu"]
    run("nnUNetv2_predict", *images, "-o", tmp_path / "theirs", *chosen, "-npp", 1, "-nps", 1)
    run("lgssl_predict", *images, "-o", tmp_path / "ours", *chosen, "-npp", 0, "-nps", 0, "--precision", "stock")
    differing = differing_voxels(tmp_path / "theirs", tmp_path / "ours")
    assert not any(differing.values()), differing


@pytest.fixture
def baseline(command_workspace, run) -> Path:
    """The folder of a SupervisedTrainer model with fold 0, trained and validated by nnUNetv2_train."""
    folder = command_workspace.model_folder("SupervisedTrainer")
    if not folder.is_dir():
        chosen = ["-tr", "SupervisedTrainer", "-p", command_workspace.plans, "-device", "cpu"]
        run("nnUNetv2_train", 997, "3d_fullres", 0, *chosen, "--npz")
    return folder


def test_nnunetv2_train_trains_our_baseline_through_the_plugin(baseline):
    assert (baseline / "fold_0" / "checkpoint_final.pth").is_file()
    assert (baseline / "fold_0" / "validation" / "summary.json").is_file()


def commands_of_the_page(page: Path, replaced: dict[str, str]) -> list[list[str]]:
    """Return the lines of a page of docs/ that call a command, in words, with the page's placeholders replaced."""
    calls = [line.split() for line in page.read_text().splitlines() if line.startswith(("    nnUNetv2_", "    lgssl_"))]
    for placeholder in replaced:
        assert any(placeholder in " ".join(call) for call in calls), placeholder
    return [[replaced.get(word, word) for word in call] for call in calls]


def test_choosing_ensembling_and_postprocessing_work_as_the_page_says(
    model, baseline, run, command_workspace, tmp_path
):
    """docs/model_selection.md, with the one fold that is trained here and the ensemble whether or not it is best."""
    replaced = {
        "501": "997",
        "LGSSLPlans": command_workspace.plans,
        "INPUT_FOLDER": str(command_workspace.test_images),
    }
    page = Path(__file__).parents[2] / "docs" / "model_selection.md"
    calls = commands_of_the_page(page, replaced)
    names = ["nnUNetv2_find_best_configuration", *["lgssl_predict"] * 2, "nnUNetv2_ensemble"]
    assert [call[0] for call in calls] == [*names, "nnUNetv2_apply_postprocessing"]
    calls = [[word for word in call if word not in {"1", "2", "3", "4"}] for call in calls]

    output = run(*calls[0], "-np", 1)
    assert f"LGSSLTrainer__{command_workspace.plans}__3d_fullres" in output
    results = model.parent
    assert set(json.loads((results / "inference_information.json").read_text())["all_results"]) == {
        model.name,
        baseline.name,
        f"ensemble___{model.name}___{baseline.name}___0",
    }
    assert (results / "inference_instructions.txt").is_file()

    for call in calls[1:4]:
        run(*call, *(["-device", "cpu", "-npp", 0, "-nps", 0] if call[0] == "lgssl_predict" else []))
    best = next(results.rglob("postprocessing.pkl")).parent
    run(*[word.replace("BEST", str(best)) for word in calls[4]], "-np", 1)
    cases = sorted(file.name for file in (tmp_path / "ENSEMBLE").glob("*.nii.gz"))
    assert len(cases) == 2
    assert cases == sorted(file.name for file in (tmp_path / "OUTPUT_FOLDER").glob("*.nii.gz"))


def test_a_fresh_process_that_has_not_imported_the_package_gets_its_own_class(run):
    code = (
        "import pickle; from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
        "found = find('LGSSLTrainer'); from lgssl_nnunet.registry import find_trainer;"
        "assert found is find_trainer('LGSSLTrainer') is pickle.loads(pickle.dumps(found)); print('same class')"
    )
    assert "same class" in run("python", "-c", code)
