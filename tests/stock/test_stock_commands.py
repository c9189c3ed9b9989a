"""nnU-Net's commands on our plans and models, run for real: they take minutes together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lgssl_nnunet.training import PLUGIN_FOLDER

pytestmark = pytest.mark.slow

COMMANDS = Path(sys.executable).parent
SECONDS = 240
ONE_CPU = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "nnUNet_def_n_proc": "1"}


@pytest.fixture
def run(command_workspace, tmp_path):
    """Run an installed command in the workspace and return what it printed."""

    def call(command: str, *words: object) -> str:
        environment = {**os.environ, **ONE_CPU, **command_workspace.environment}
        environment["nnUNet_extTrainer"] = str(PLUGIN_FOLDER)
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


def test_nnunetv2_find_best_configuration_reads_a_validated_fold(model, run, command_workspace):
    chosen = ["-p", command_workspace.plans, "-c", "3d_fullres", "-tr", "LGSSLTrainer", "-f", 0, "-np", 1]
    output = run("nnUNetv2_find_best_configuration", 997, *chosen)
    assert f"LGSSLTrainer__{command_workspace.plans}__3d_fullres" in output
    assert (model / "crossval_results_folds_0" / "postprocessing.pkl").is_file()


def test_nnunetv2_train_trains_our_baseline_through_the_plugin(run, command_workspace):
    run(
        "nnUNetv2_train", 997, "3d_fullres", 0, "-tr", "SupervisedTrainer", "-p", command_workspace.plans,
        "-device", "cpu",
    )  # fmt: skip
    fold = command_workspace.model_folder("SupervisedTrainer") / "fold_0"
    assert (fold / "checkpoint_final.pth").is_file()
    assert (fold / "validation" / "summary.json").is_file()


def test_a_fresh_process_that_has_not_imported_the_package_gets_its_own_class(run):
    code = (
        "import pickle; from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
        "found = find('LGSSLTrainer'); from lgssl_nnunet.registry import find_trainer;"
        "assert found is find_trainer('LGSSLTrainer') is pickle.loads(pickle.dumps(found)); print('same class')"
    )
    assert "same class" in run("python", "-c", code)
