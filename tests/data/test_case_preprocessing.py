"""A case as nnU-Net's preprocessor returns it: that preprocessor is the reference."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

from lgssl_nnunet.data.cropping import nonzero_box, outside
from lgssl_nnunet.data.preprocessing import class_locations, preprocess, recipe_of
from lgssl_nnunet.errors import DatasetError

SHAPE = (14, 30, 26)
LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3}
REGIONS = {"background": 0, "organs": [1, 2, 3], "spleen": [2], "ignore": 4}


@pytest.fixture
def case(tmp_path):
    """Two channels and a label; the body has a hole of zeros, and zeros around it."""
    random = np.random.default_rng(0)
    body = np.zeros(SHAPE, dtype=bool)
    body[2:13, 4:27, 3:20] = True
    body[5:7, 10:14, 8:12] = False
    body[2:6, 4:12, 3:9] = False
    scores = [ndimage.gaussian_filter(random.normal(size=SHAPE), 2) for _ in range(4)]
    label = np.where(body, np.argmax(scores, axis=0), 0).astype(np.uint8)
    files = [tmp_path / f"case_000{channel}.nii.gz" for channel in (0, 1)] + [tmp_path / "case.nii.gz"]
    for channel, file in enumerate(files):
        image = label if channel == 2 else (random.normal(50, 20, SHAPE) + 30 * label) * body
        volume = sitk.GetImageFromArray(image.astype(np.uint8 if channel == 2 else np.float32))
        volume.SetSpacing((0.9, 1.1, 2.0))
        sitk.WriteImage(volume, str(file))
    return [str(file) for file in files[:2]], str(files[2])


def plans(labels=LABELS, spacing=(1.5, 1.0, 1.2), **changes):
    """Return plans manager, configuration manager and dataset.json of a CT and a masked MRI channel."""
    intensities = {"mean": 60.0, "std": 25.0, "percentile_00_5": 5.0, "percentile_99_5": 140.0}
    orders = {"order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "architecture": {},
        "preprocessor_name": "DefaultPreprocessor",
        "spacing": list(spacing),
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
        "use_mask_for_norm": [False, True],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, **orders},
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {"is_seg": True, **orders, "order": 1},
        **changes,
    }
    manager = PlansManager(
        {
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [1, 0, 2],
            "foreground_intensity_properties_per_channel": {"0": intensities, "1": intensities},
            "label_manager": "LabelManager",
            "configurations": {"some": configuration},
        }
    )
    dataset_json = {"labels": labels, "regions_class_order": [1, 2], "channel_names": {"0": "CT", "1": "MRI"}}
    return manager, manager.get_configuration("some"), dataset_json


@pytest.mark.parametrize("labels", [LABELS, REGIONS])
@pytest.mark.parametrize("spacing", [(1.5, 1.0, 1.2), (1.1, 6.0, 0.8), (1.2, 1.0), (1.1, 2.0, 0.9)])
def test_image_label_and_properties_are_those_of_nnunet(case, labels, spacing):
    images, label_file = case
    planned = plans(labels, spacing)
    preprocessor = planned[1].preprocessor_class(verbose=False)
    image, segmentation, properties = preprocessor.run_case(images, label_file, *planned)
    found = preprocess(images, label_file, recipe_of(*planned))
    assert found.image.shape == image.shape
    assert np.abs(found.image - image).max() <= 1e-5 * np.ptp(image)
    assert set(np.unique(segmentation)) == {-1, 0, 1, 2, 3}
    for label in np.unique(segmentation):  # exact ties of labels are settled by rounding in nnU-Net
        one, other = found.label == label, segmentation == label
        assert 2 * (one & other).sum() / (one.sum() + other.sum()) >= 0.999
    assert list(found.properties.pop("class_locations")) == list(properties.pop("class_locations"))
    assert found.properties == properties


def test_places_of_classes_are_those_that_nnunet_draws():
    labels = np.random.default_rng(0).integers(-1, 4, (1, 40, 50, 60)).astype(np.int16)
    classes = [1, (1, 3), 7, (2,)]
    expected = DefaultPreprocessor._sample_foreground_locations(labels, [1, [1, 3], 7, [2]])
    found = class_locations(labels, classes)
    assert list(found) == classes == list(expected)
    for key in classes:
        np.testing.assert_array_equal(found[key], expected[key])


def test_without_a_label_the_image_is_the_same_and_there_is_no_label(case):
    images, label = case
    recipe = recipe_of(*plans())
    with_label, without = preprocess(images, label, recipe), preprocess(images, None, recipe)
    np.testing.assert_array_equal(with_label.image, without.image)
    assert without.label is None
    assert "class_locations" not in without.properties


@pytest.mark.parametrize("spacing", [(1.5, 1.0, 1.2), (1.1, 6.0, 0.8), (1.1, 2.0, 0.9)])
def test_an_unlabelled_image_is_zero_outside_of_the_body_where_labelled_patches_are(case, spacing):
    images, _ = case
    planned = plans(spacing=spacing)
    _, segmentation, _ = planned[1].preprocessor_class(verbose=False).run_case(images, None, *planned)
    outside_body = segmentation[0] == -1
    plain, cleared = (preprocess(images, None, recipe_of(*planned), clear=clear).image for clear in (False, True))
    zero = cleared[1] == 0
    assert 2 * (zero & outside_body).sum() / (zero.sum() + outside_body.sum()) >= 0.999
    np.testing.assert_array_equal(cleared[1][~zero], plain[1][~zero])
    np.testing.assert_array_equal(cleared[0], plain[0])  # that channel is not masked
    if plain.shape[1:] != SHAPE and spacing != (1.1, 2.0, 0.9):
        assert (plain[1][outside_body] != 0).mean() > 0.2  # what the spline leaves there


def test_an_image_with_a_label_is_zero_where_the_label_is_outside(case):
    images, label = case
    recipe = recipe_of(*plans())
    plain, cleared = (preprocess(images, label, recipe, clear=clear) for clear in (False, True))
    outside_body = cleared.label[0] < 0
    assert np.abs(plain.image[1][outside_body]).max() > 0.01
    np.testing.assert_array_equal(cleared.image[1], np.where(outside_body, 0, plain.image[1]))
    np.testing.assert_array_equal(cleared.image[0], plain.image[0])  # that channel is not masked
    np.testing.assert_array_equal(cleared.label, plain.label)


@pytest.mark.parametrize("labeled", [True, False])
def test_an_image_without_a_masked_channel_is_not_cleared(case, labeled):
    images, label = case
    recipe = recipe_of(*plans(use_mask_for_norm=[False, False]))
    plain, cleared = (preprocess(images, label if labeled else None, recipe, clear=c).image for c in (False, True))
    np.testing.assert_array_equal(plain, cleared)


@pytest.mark.parametrize(
    "change",
    [
        {"preprocessor_name": "Another"},
        {"resampling_fn_data": "resample_torch_fornnunet"},
        {"resampling_fn_seg_kwargs": {"is_seg": True, "order": 0, "order_z": 0, "force_separate_z": None}},
        {"resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0}},
        {"normalization_schemes": ["CTNormalization", "Own"]},
    ],
)
def test_plans_with_other_steps_have_no_recipe(change):
    assert recipe_of(*plans(**change)) is None


def test_a_label_of_another_shape_is_refused(case, tmp_path):
    images, _ = case
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / "other.nii.gz"))
    with pytest.raises(ValueError, match=r"\(14, 30, 26\).*\(3, 4, 5\)"):
        preprocess(images, str(tmp_path / "other.nii.gz"), recipe_of(*plans()))


def test_a_scan_of_which_resampling_leaves_nothing_is_refused_in_a_sentence(case):
    images, _ = case
    volumes = [sitk.ReadImage(file) for file in images]
    for file, volume in zip(images, volumes, strict=True):
        sitk.WriteImage(volume[:, :, 5:6], file)
    message = r"case_0000\.nii\.gz: the scan is 2 mm thick .* a voxel of the plans 5 mm, so resampling"
    with pytest.raises(DatasetError, match=message):
        preprocess(images, None, recipe_of(*plans(spacing=(1.0, 5.0, 1.2))))
    assert preprocess(images, None, recipe_of(*plans(spacing=(1.0, 3.0, 1.2)))).image.shape[2] == 1


def test_box_and_holes_are_those_of_nnunet():
    image = np.random.default_rng(0).integers(0, 2, (2, 9, 11, 8)).astype(np.float32)
    image[:, :2], image[:, :, :, 6:], image[:, 4:6, 4:7, 2:5] = 0, 0, 0
    _, mask, box = crop_to_nonzero(image.copy())
    found = nonzero_box(image)
    assert [[side.start, side.stop] for side in found] == [list(side) for side in box]
    np.testing.assert_array_equal(outside(image[(slice(None), *found)]), mask[0] < 0)


def test_an_empty_image_is_not_cropped():
    image = np.zeros((1, 3, 4, 5), dtype=np.float32)
    assert nonzero_box(image) == (slice(0, 3), slice(0, 4), slice(0, 5))
    assert outside(image).all()


@pytest.mark.parametrize("module", ["plans.preprocessing", "plans.fingerprint", "plans.integrity"])
def test_worker_processes_do_without_torch(module):
    modules = f"lgssl_nnunet.{module}, nnunetv2.imageio.simpleitk_reader_writer"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
