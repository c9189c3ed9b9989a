"""Models of sided classes and images that store the patient's left elsewhere than their training images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.errors import DatasetError


@pytest.fixture
def sided(model_maker):
    """A model whose training images lay as `lying` says; None for one without sided classes."""

    def make(lying, mirroring_axes=(0, 1), transpose_forward=(0, 1, 2)):
        file = model_maker() / "plans.json"
        block = {"mirroring_axes": mirroring_axes} | ({} if lying is None else {"left_right": lying})
        order = {"transpose_forward": transpose_forward, "transpose_backward": np.argsort(transpose_forward).tolist()}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lgssl": block} | order))

    return make


@pytest.fixture
def stored(images):
    """Two images of the identity's direction, of which b was turned to another orientation."""

    def write(orientation):
        for name, code in (("a", "LPS"), ("b", orientation)):
            file = images / f"{name}_0000.nii.gz"
            image = sitk.ReadImage(str(file))
            image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, 1))
            sitk.WriteImage(sitk.DICOMOrient(image, code), str(file))
        return images

    return write


@pytest.mark.parametrize(
    ("orientation", "words"), [("RPS", "left is on the other side"), ("PLS", "left to right is array axis 1, not 2")]
)
def test_images_whose_left_is_elsewhere_are_refused_by_name(sided, stored, tmp_path, predict_here, orientation, words):
    sided({"axis": 2, "sign": 1})
    with pytest.raises(DatasetError, match=words) as refusal:
        predict_here(stored(orientation), tmp_path / "out")
    assert "b_0000.nii.gz" in str(refusal.value)
    assert "a_0000.nii.gz" not in str(refusal.value)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("lying", [None, {"axis": 2, "sign": 1}])
def test_other_turns_and_models_without_sides_take_any(sided, stored, tmp_path, predict_here, lying):
    sided(lying)
    assert len(predict_here(stored("LAI" if lying else "RAS"), tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("mirroring_axes", "transpose_forward"), [(None, (0, 1, 2)), ([0, 1, 2], (0, 1, 2)), ([0, 1], (1, 2, 0))]
)
def test_models_that_were_trained_with_mirroring_left_and_right_take_any(
    mirroring_axes, transpose_forward, sided, stored, tmp_path, predict_here
):
    sided({"axis": 2, "sign": 1}, mirroring_axes, transpose_forward)
    assert len(predict_here(stored("RPS"), tmp_path / "out", disable_tta=True)) == 2


def test_the_axis_of_left_and_right_is_looked_up_in_the_transposed_order(sided, stored, tmp_path, predict_here):
    sided({"axis": 2, "sign": 1}, [0, 2], (0, 2, 1))
    with pytest.raises(DatasetError, match="left is on the other side"):
        predict_here(stored("RPS"), tmp_path / "out")
