"""Models of sided classes and images that store the patient's left elsewhere than their training images."""

from __future__ import annotations

import json

import pytest
import SimpleITK as sitk

from lgssl_nnunet.errors import DatasetError


@pytest.fixture
def sided(model_maker):
    """A model whose training images lay as `lying` says; None for one without sided classes."""

    def make(lying):
        file = model_maker() / "plans.json"
        block = {"mirroring_axes": [0, 1]} | ({} if lying is None else {"left_right": lying})
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lgssl": block}))

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
