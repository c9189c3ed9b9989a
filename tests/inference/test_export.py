"""Export by slabs: nnU-Net's own export is the reference."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from lgssl_nnunet.inference import export
from lgssl_nnunet.inference.export import can_export_by_slabs, nearest_axis, segment, write_segmentation

CLASSES = SimpleNamespace(has_regions=False, foreground_labels=[1, 2, 3, 4])
GRIDS = [
    ((10, 12, 14), (21, 19, 30), None),
    ((10, 12, 14), (7, 30, 9), None),
    ((10, 12, 14), (10, 12, 14), None),
    ((10, 12, 14), (10, 20, 30), None),
    ((6, 12, 14), (10, 20, 31), 0),
    ((10, 12, 14), (4, 20, 31), 0),
    ((12, 6, 14), (20, 11, 31), 1),
    ((12, 14, 6), (20, 31, 5), 2),
    ((1, 12, 14), (1, 25, 20), None),
    ((1, 1, 1), (2, 3, 4), None),
]


def smooth_logits(shape, channels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, channels, *[max(1, size // 3) for size in shape], generator=generator)
    return 4 * torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]


@pytest.mark.parametrize(("shape", "target", "axis"), GRIDS)
def test_labels_are_those_of_nnunets_resampled_logits(shape, target, axis):
    logits = smooth_logits(shape)
    resampled = resample_data_or_seg(logits.numpy(), target, False, axis, 1, axis is not None, order_z=0)
    found = segment(logits, target, axis, CLASSES)
    assert found.dtype == np.uint8
    assert found.shape == target
    assert len(np.unique(found)) > 1 or shape == (1, 1, 1)
    # float32 here and float64 there: a voxel on a border may fall to the other side.
    assert (found != resampled.argmax(0)).mean() <= 1e-4


@pytest.mark.parametrize(("shape", "target", "axis"), GRIDS)
def test_slabs_of_a_row_are_the_same_as_one_slab(shape, target, axis, monkeypatch):
    logits = smooth_logits(shape)
    whole = segment(logits, target, axis, CLASSES)
    monkeypatch.setattr(export, "SLAB_BYTES", 1)
    seen = []
    resampled = export._resampled_slab
    monkeypatch.setattr(export, "_resampled_slab", lambda *arguments: seen.append(resampled(*arguments)) or seen[-1])
    assert np.array_equal(segment(logits, target, axis, CLASSES), whole)
    assert [slab.shape for slab in seen] == [(5, 1, *target[1:])] * target[0]


def test_the_first_of_equal_logits_wins_as_in_numpy():
    logits = torch.zeros(3, 2, 2, 2)
    logits[1:, 0] = 1
    labels = segment(logits, (2, 2, 2), None, CLASSES)
    assert np.array_equal(labels, logits.numpy().argmax(0))


def test_many_classes_get_two_bytes():
    many = SimpleNamespace(has_regions=False, foreground_labels=list(range(1, 300)))
    logits = torch.zeros(300, 1, 1, 2)
    logits[299, ..., 1] = 1
    assert segment(logits, (1, 1, 2), None, many).tolist() == [[[0, 299]]]


# ------------------------------------------------------------------------------------------------------ written files


def properties_of(shape, spacing, crop):
    """Properties of an image (X, Y, Z) as nnU-Net's preprocessor leaves them; nothing is transposed yet."""
    image = sitk.Image([size + 5 for size in shape[::-1]], sitk.sitkUInt8)
    return {
        "sitk_stuff": {
            "spacing": spacing[::-1],
            "origin": image.GetOrigin(),
            "direction": image.GetDirection(),
        },
        "spacing": list(spacing),
        "shape_before_cropping": tuple(size + 5 for size in shape),
        "bbox_used_for_cropping": [[crop, crop + size] for size in shape],
        "shape_after_cropping_and_before_resampling": tuple(shape),
    }


def both_exports(folder, plans, dataset_json, logits, properties):
    manager = PlansManager(plans)
    name = next(iter(plans["configurations"]))
    configuration = manager.get_configuration(name)
    labels = manager.get_label_manager(dataset_json)
    assert can_export_by_slabs(configuration)
    export_prediction_from_logits(
        logits.numpy(), properties, configuration, manager, dataset_json, str(folder / "stock"), num_threads_torch=1
    )
    write_segmentation(logits, properties, configuration, manager, labels, folder / "ours.nii.gz")
    return [sitk.ReadImage(str(folder / name)) for name in ("stock.nii.gz", "ours.nii.gz")]


@pytest.fixture
def plans(model_maker):
    return json.loads((model_maker() / "plans.json").read_text())


DATASET = {
    "labels": {"background": 0, "kidney": 1, "tumour": 2},
    "file_ending": ".nii.gz",
    "channel_names": {"0": "CT"},
}
REGIONS = {
    **DATASET,
    "labels": {"background": 0, "whole": [1, 2], "core": 2},
    "regions_class_order": [1, 2],
}


@pytest.mark.parametrize("dataset_json", [DATASET, REGIONS], ids=["classes", "regions"])
@pytest.mark.parametrize("spacing", [(3.0, 2.5, 0.9), (9.0, 1.0, 1.0)], ids=["linear", "nearest slice"])
def test_the_file_is_nnunets(spacing, dataset_json, plans, tmp_path):
    # Plans that turn the axes: what is cropped and resampled has them in another order than the file.
    plans["transpose_forward"], plans["transpose_backward"] = [1, 0, 2], [1, 0, 2]
    shape = (17, 23, 19)
    properties = properties_of(shape, [spacing[axis] for axis in (1, 0, 2)], crop=3)
    logits = smooth_logits((9, 15, 12), channels=3 if dataset_json is DATASET else 2)
    stock, ours = both_exports(tmp_path, plans, dataset_json, logits, properties)
    assert ours.GetSpacing() == stock.GetSpacing()
    assert ours.GetPixelID() == stock.GetPixelID()
    voxels = sitk.GetArrayFromImage(ours)
    assert set(np.unique(voxels)) == {0, 1, 2}
    assert (voxels != sitk.GetArrayFromImage(stock)).mean() <= 1e-4


def test_the_nearest_axis_is_that_of_long_voxels_in_image_or_plans(plans):
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")  # spacing 1.5, 1.25, 1.0

    def axis(*spacing):
        return nearest_axis({"spacing": spacing}, configuration, manager)

    assert axis(1.0, 1.0, 1.0) is None
    assert axis(6.0, 1.0, 1.0) == 0
    assert axis(1.0, 1.0, 6.0) == 2
    assert axis(1.0, 6.0, 6.0) is None  # two long axes: nnU-Net resamples in one go


@pytest.mark.parametrize(
    "change", [{"order": 3}, {"order_z": 1}, {"is_seg": True}, {"separate_z_anisotropy_threshold": 10}]
)
def test_other_resampling_is_left_to_nnunet(change, plans):
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    assert can_export_by_slabs(configuration)
    configuration.configuration["resampling_fn_probabilities_kwargs"] |= change
    assert not can_export_by_slabs(configuration)


def test_resampling_without_a_word_on_thick_slices_is_left_to_nnunet(plans):
    """nnU-Net takes False for what is missing, and None for what its own plans say."""
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    del configuration.configuration["resampling_fn_probabilities_kwargs"]["force_separate_z"]
    assert not can_export_by_slabs(configuration)


def test_another_resampling_function_is_left_to_nnunet(plans):
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    configuration.configuration["resampling_fn_probabilities"] = "resample_torch_fornnunet"
    assert not can_export_by_slabs(configuration)
