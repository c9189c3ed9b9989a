"""A model of ours in the hands of nnU-Net's own predictor, in this process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from lgssl_nnunet.registry import find_trainer, trainer_names


@pytest.mark.parametrize("trainer", trainer_names())
def test_nnunet_finds_the_packages_own_class_through_the_plugin(trainer, in_workspace):
    found = recursive_find_trainer_class_by_name(trainer)
    assert found is find_trainer(trainer)
    assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize("trainer", trainer_names())
def test_nnunets_predictor_gives_the_segmentation_of_ours_to_the_voxel(
    trainer, in_workspace, train_once, ours, tmp_path, differing_voxels
):
    folder = train_once(trainer)
    images = sorted(in_workspace.test_images.glob("*.nii.gz"))
    theirs = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(folder), ("all",))
    (tmp_path / "theirs").mkdir()
    theirs.predict_from_files_sequential(
        [[str(image)] for image in images], str(tmp_path / "theirs"), save_probabilities=True
    )
    differing = differing_voxels(tmp_path / "theirs", ours(folder))
    assert not any(differing.values()), differing
    for file in (tmp_path / "theirs").glob("*.npz"):
        assert np.array_equal(*[np.load(path)["probabilities"] for path in (file, tmp_path / "ours" / file.name)])
