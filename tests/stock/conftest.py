"""Tiny trained models, on which nnU-Net's own predictor and commands are let loose."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset

PHANTOM = PhantomSpec(num_labeled=5, num_unlabeled=2, num_test=2, shape=(18, 24, 24), dataset_id=997)
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class Workspace:
    """nnU-Net's three folders with one planned dataset.

    Attributes:
        root: holds the three folders.
        dataset: name of the dataset.
        plans: name of its plans, whose patches are smaller than the images and whose spacing differs from theirs.
    """

    root: Path
    dataset: str
    plans: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make nnU-Net and this package use this workspace, without worker processes."""
        return {**{name: str(self.root / name) for name in VARIABLES}, "nnUNet_n_proc_DA": "0"}

    @property
    def test_images(self) -> Path:
        return self.root / "nnUNet_raw" / self.dataset / "imagesTs"

    def model_folder(self, trainer: str) -> Path:
        return self.root / "nnUNet_results" / self.dataset / f"{trainer}__{self.plans}__3d_fullres"


def shrink(plans: dict) -> dict:
    """Return plans for a training of seconds: several windows per image, a tiny network, sixteen iterations."""
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [16, 16, 16]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [min(features // 2, 16) for features in kwargs["features_per_stage"]]
    # At this learning rate sixteen iterations are enough for segmentations that show all classes.
    plans["lgssl"]["schedule"].update(
        num_epochs=1, iterations_per_epoch=16, val_iterations_per_epoch=1, initial_lr=0.01
    )
    return plans


def make_workspace(root: Path) -> Workspace:
    """Draw the phantom, plan and preprocess it under `root`."""
    from lgssl_nnunet.plans.cases import load_raw_dataset
    from lgssl_nnunet.plans.plan import plan_and_preprocess
    from lgssl_nnunet.plans.preprocessing import copy_labels, preprocess_configuration

    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        write_phantom_dataset(root / "nnUNet_raw", PHANTOM)
        options = {"planner": "LGSSLPlannerCPU", "overwrite_target_spacing": (3.4, 3.2, 3.2), "preprocess": False}
        workers = {"num_processes_fingerprint": 0, "progress": False}
        (file,) = plan_and_preprocess(PHANTOM.dataset_id, **options, **workers)
        plans = shrink(json.loads(file.read_text()))
        file.write_text(json.dumps(plans))
        # After the patch has become smaller: files are stored in blocks that suit the patch.
        dataset = load_raw_dataset(PHANTOM.dataset_id)
        copy_labels(dataset, file.parent)
        preprocess_configuration(dataset, plans, "3d_fullres", file.parent, progress=False)
    return Workspace(root, PHANTOM.name, file.stem)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Workspace:
    """A planned dataset for tests in this process."""
    return make_workspace(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="session")
def command_workspace(tmp_path_factory) -> Workspace:
    """A planned dataset for tests that run commands, which train the models themselves."""
    return make_workspace(tmp_path_factory.mktemp("stock_commands"))


@pytest.fixture(scope="session")
def train_once(workspace):
    """Train a trainer on the workspace, once per session, and return the model folder."""
    from lgssl_nnunet.registry import find_trainer
    from lgssl_nnunet.training import train

    def trained(trainer: str) -> Path:
        folder = workspace.model_folder(trainer)
        if not folder.is_dir():
            if source := getattr(find_trainer(trainer).hyperparameters, "source", None):
                trained(source)
            with pytest.MonkeyPatch.context() as patch:
                for name, value in workspace.environment.items():
                    patch.setenv(name, value)
                train(workspace.dataset, trainer=trainer, fold="all", device="cpu", progress=False)
        return folder

    return trained


@pytest.fixture
def in_workspace(workspace, monkeypatch):
    """Point the environment at the workspace, and nnU-Net at our plug-in."""
    from lgssl_nnunet.installation import ext_trainer_path

    for name, value in {**workspace.environment, "nnUNet_extTrainer": str(ext_trainer_path())}.items():
        monkeypatch.setenv(name, value)
    return workspace


def differing_voxels(one: Path, other: Path) -> dict[str, int]:
    """Return by file name how many voxels of the segmentations in two folders differ.

    Each must lie in the same place and show two classes or more in over 0.5 % of its voxels, or agreement means little.
    """
    names = sorted(file.name for file in one.glob("*.nii.gz"))
    assert names == sorted(file.name for file in other.glob("*.nii.gz"))
    assert len(names) == PHANTOM.num_test
    differing = {}
    for name in names:
        images = [sitk.ReadImage(str(folder / name)) for folder in (one, other)]
        assert images[0].GetSpacing() == images[1].GetSpacing()
        assert images[0].GetOrigin() == images[1].GetOrigin()
        assert images[0].GetDirection() == images[1].GetDirection()
        arrays = [sitk.GetArrayFromImage(image) for image in images]
        assert (np.bincount(arrays[0].ravel()) > 0.005 * arrays[0].size).sum() >= 2
        differing[name] = int((arrays[0] != arrays[1]).sum())
    return differing


@pytest.fixture(name="differing_voxels")
def differing_voxels_function():
    return differing_voxels


@pytest.fixture
def ours(in_workspace, tmp_path):
    """Predict the test images with a model, as nnU-Net computes."""
    from lgssl_nnunet.inference.predict import predict

    def run(model: Path) -> Path:
        predict(
            in_workspace.test_images,
            tmp_path / "ours",
            model_folder=model,
            precision="stock",
            save_probabilities=True,
            device="cpu",
            num_processes_preprocessing=0,
            num_processes_segmentation_export=0,
            progress=False,
        )
        return tmp_path / "ours"

    return run
