"""Models exported with --stock, installed and run by nnU-Net alone: without the plug-in, and without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_import import install_model_from_zip_file

from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.inference.export_model import export_model
from lgssl_nnunet.registry import trainer_names

# What they predict with has parts that nnU-Net's network lacks: prompts, a second network, gates.
MORE_THAN_PLANNED = {"LGSSLTrainer", "MCFTrainer", "CoBioNetTrainer", "TACTrainer"}
NNUNET_ALONE = """
import sys
sys.modules["lgssl_nnunet"] = None  # any import of it fails
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from nnunetv2.model_sharing.entry_points import install_from_zip_entry_point
if __name__ == "__main__":
    archive, *words = sys.argv[1:]
    sys.argv[1:] = [archive]
    install_from_zip_entry_point()
    sys.argv[1:] = words
    predict_entry_point()
"""


@pytest.fixture
def without_plugin(in_workspace, monkeypatch, tmp_path):
    """The workspace, whose models nnU-Net neither sees nor could build."""
    monkeypatch.delenv("nnUNet_extTrainer")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()
    return in_workspace


def installed(archive: Path, results: Path) -> Path:
    """Install a zip file by nnU-Net and return the model folder."""
    install_model_from_zip_file(str(archive))
    (plans,) = results.rglob("plans.json")
    return plans.parent


@pytest.mark.parametrize("trainer", sorted(set(trainer_names()) - MORE_THAN_PLANNED))
def test_nnunet_installs_the_model_and_segments_as_the_method_does(
    trainer, train_once, without_plugin, ours, tmp_path, differing_voxels
):
    model = train_once(trainer)
    archive = export_model(tmp_path / "stock.zip", model_folder=model, stock=True)
    folder = installed(archive, tmp_path / "results")
    assert folder.name == f"nnUNetTrainer__{without_plugin.plans}_{trainer}__3d_fullres"
    assert folder.parent.name == without_plugin.dataset
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(folder), ("all",))
    (tmp_path / "theirs").mkdir()
    images = sorted(without_plugin.test_images.glob("*.nii.gz"))
    theirs.predict_from_files_sequential([[str(image)] for image in images], str(tmp_path / "theirs"), True)
    differing = differing_voxels(tmp_path / "theirs", ours(model))
    assert not any(differing.values()), differing
    for file in (tmp_path / "theirs").glob("*.npz"):
        assert np.array_equal(*[np.load(path)["probabilities"] for path in (file, tmp_path / "ours" / file.name)])


@pytest.mark.parametrize("trainer", sorted(MORE_THAN_PLANNED))
def test_a_method_whose_network_is_more_than_the_plans_network_is_refused(trainer, train_once, tmp_path):
    model = train_once(trainer)
    with pytest.raises(
        UsageError, match=rf"--stock: {trainer} predicts with more than the network .*leave --stock out"
    ):
        export_model(tmp_path / "stock.zip", model_folder=model, stock=True)
    assert list(tmp_path.iterdir()) == []
    assert export_model(tmp_path / "bundle.zip", model_folder=model).is_file()


@pytest.mark.slow
def test_nnunets_commands_need_nothing_of_this_package(
    train_once, without_plugin, ours, tmp_path, differing_voxels, monkeypatch
):
    model = train_once("SupervisedTrainer")
    archive = export_model(tmp_path / "stock.zip", model_folder=model, stock=True)
    plans = f"{without_plugin.plans}_SupervisedTrainer"
    (tmp_path / "alone.py").write_text(NNUNET_ALONE)
    words = ["-i", without_plugin.test_images, "-o", tmp_path / "theirs", "-d", 997, "-c", "3d_fullres", "-p", plans]
    line = [sys.executable, tmp_path / "alone.py", archive, *words, "-f", "all", "-device", "cpu", "-npp", 1, "-nps", 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1"}
    done = subprocess.run(
        [str(word) for word in line],
        env=environment,
        cwd=tmp_path,
        timeout=240,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    differing = differing_voxels(tmp_path / "theirs", ours(model))
    assert not any(differing.values()), differing


def test_the_zip_file_names_no_case_and_holds_no_more_than_prediction_needs(train_once, without_plugin, tmp_path):
    model = train_once("SupervisedTrainer")
    cases = json.loads((model / "plans.json").read_text())["lgssl"]["split"]
    names = [name for kind in cases.values() for name in kind]
    archive = export_model(tmp_path / "stock.zip", model_folder=model, stock=True)
    with zipfile.ZipFile(archive) as opened:
        members = {Path(name).name: opened.read(name).decode("latin-1") for name in opened.namelist()}
    assert set(members) == {"plans.json", "dataset.json", "dataset_fingerprint.json", "checkpoint_final.pth"}
    assert len(names) >= 7
    for content in members.values():
        assert [name for name in (*names, str(without_plugin.root), "optimizer") if name in content] == []
    folder = installed(archive, tmp_path / "results")
    checkpoint = torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=True)
    assert set(checkpoint) == {
        "trainer_name",
        "init_args",
        "inference_allowed_mirroring_axes",
        "network_weights",
    }


def test_two_methods_are_installed_side_by_side_and_lgssl_predict_runs_them(train_once, without_plugin, ours, tmp_path):
    for trainer in ("SupervisedTrainer", "UAMTTrainer"):
        archive = export_model(tmp_path / f"{trainer}.zip", model_folder=train_once(trainer), stock=True)
        install_model_from_zip_file(str(archive))
    folders = sorted((tmp_path / "results").glob("*/*"))
    assert [folder.name.split("__")[1].split("_")[-1] for folder in folders] == ["SupervisedTrainer", "UAMTTrainer"]
    assert len(list(ours(folders[1]).glob("*.nii.gz"))) == 2


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "..\\x", "", None])
def test_plans_with_a_name_that_leads_elsewhere_are_not_exported(name, train_once, tmp_path):
    bundle = tmp_path / "model"
    bundle.mkdir()
    source = train_once("SupervisedTrainer")
    plans = json.loads((source / "plans.json").read_text())
    (bundle / "plans.json").write_text(json.dumps({**plans, "dataset_name": name}))
    (bundle / "dataset.json").write_bytes((source / "dataset.json").read_bytes())
    (bundle / "fold_all").symlink_to(source / "fold_all")
    with pytest.raises(CheckpointError, match="which is no name of a folder"):
        export_model(tmp_path / "stock.zip", model_folder=bundle, stock=True)
    assert not (tmp_path / "stock.zip").exists()
