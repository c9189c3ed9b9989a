"""Tiny trained models in nnU-Net's layout, and images for them; no training, no worker processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

LABELS = {"background": 0, "kidney": 1, "tumour": 2}
SPACING, ORIGIN, DIRECTION = (1.0, 1.25, 1.5), (-12.5, 40.0, 7.0), (-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)


def tiny_plans(make_configuration: Callable[..., Any], channels: int, spatial: int = 3) -> dict:
    planned = make_configuration((16,) * spatial, ((1,) * spatial, (2,) * spatial)).configuration
    intensity = {"max": 1, "mean": 0, "median": 0, "min": -1, "percentile_00_5": -1, "percentile_99_5": 1, "std": 1}
    configuration = {
        "data_identifier": "tiny",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": planned["patch_size"],
        "median_image_size_in_voxels": [20] * spatial,
        "spacing": [1.5, 1.25, 1.0][-spatial:],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "batch_dice": False,
        "architecture": planned["architecture"],
    }
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {
            "is_seg": kind == "seg",
            "order": order,
            "order_z": 0,
            "force_separate_z": None,
        }
    return {
        "dataset_name": "Dataset501_Tiny",
        "plans_name": "LGSSLCPUPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {str(i): intensity for i in range(channels)},
        "configurations": {
            "3d_fullres" if spatial == 3 else "2d": configuration,
            "3d_cascade_fullres": {
                "inherits_from": "3d_fullres" if spatial == 3 else "2d",
                "previous_stage": "3d_lowres",
            },
        },
    }


def save_tiny_model(
    make_configuration: Callable[..., Any],
    results: Path,
    *,
    dataset: str = "Dataset501_Tiny",
    trainer: str = "nnUNetTrainer",
    plans: str = "LGSSLCPUPlans",
    configuration: str = "3d_fullres",
    folds: tuple = (0,),
    channels: int = 1,
    mirroring_axes: tuple | None = (0, 1, 2),
    trained_by: str = "nnUNetTrainer",
) -> Path:
    """Write a model folder whose networks have random weights, a different draw per fold."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder = results / dataset / f"{trainer}__{plans}__{configuration}"
    names = {str(i): name for i, name in enumerate(["T1", "T2"][:channels])}
    dataset_json = {"channel_names": names, "labels": LABELS, "numTraining": 1, "file_ending": ".nii.gz"}
    content = tiny_plans(make_configuration, channels, 2 if configuration == "2d" else 3)
    for number, fold in enumerate(folds):
        torch.manual_seed(number)
        manager = PlansManager(content)
        network = nnUNetTrainer.build_network_architecture(
            manager, manager.get_configuration(configuration), channels, len(LABELS), enable_deep_supervision=False
        )
        checkpoint = {
            "trainer_name": trained_by,
            "init_args": {"configuration": configuration},
            "inference_allowed_mirroring_axes": mirroring_axes,
            "network_weights": network.state_dict(),
        }
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    return folder


def save_image(file: Path, seed: int = 0, size: tuple[int, ...] = (20, 16, 14)) -> Path:
    """Write a random image of `size` voxels (x, y, z) with a geometry that is not the identity."""
    array = np.random.default_rng(seed).normal(size=size[::-1]).astype(np.float32)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING[: len(size)])
    image.SetOrigin(ORIGIN[: len(size)])
    if len(size) == 3:
        image.SetDirection(DIRECTION)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """An empty results folder that nnUNet_results names."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_results", str(folder))
    return folder


@pytest.fixture(scope="session")
def one_fold(tmp_path_factory, make_configuration) -> Path:
    """The results folder of one finished single-channel model; not to be changed."""
    results = tmp_path_factory.mktemp("one_fold")
    save_tiny_model(make_configuration, results)
    return results


@pytest.fixture
def trained(one_fold, monkeypatch) -> Path:
    """nnUNet_results with one finished single-channel model."""
    monkeypatch.setenv("nnUNet_results", str(one_fold))
    return one_fold


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with two single-channel cases."""
    folder = tmp_path / "images"
    save_image(folder / "a_0000.nii.gz", seed=1)
    save_image(folder / "b_0000.nii.gz", seed=2)
    return folder


@pytest.fixture
def predict_here() -> Callable[..., list[Path]]:
    """`predict` on the CPU in this process."""
    from lgssl_nnunet.inference.predict import predict

    def run(*arguments, **options) -> list[Path]:
        quick = {
            "device": "cpu",
            "num_processes_preprocessing": 0,
            "num_processes_segmentation_export": 0,
            "progress": False,
        }
        return predict(*arguments, **{**quick, **options})

    return run


@pytest.fixture
def model_maker(results, make_configuration) -> Callable[..., Path]:
    """`save_tiny_model` into nnUNet_results."""

    def make(**options) -> Path:
        return save_tiny_model(make_configuration, results, **options)

    return make


@pytest.fixture
def image_maker() -> Callable[..., Path]:
    """`save_image`."""
    return save_image
