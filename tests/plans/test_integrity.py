from __future__ import annotations

import gzip

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.plans import integrity
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.integrity import check_integrity


def change(path, *, array=None, **geometry) -> None:
    """Write an image again with other voxels or another place in space."""
    old = sitk.ReadImage(str(path))
    new = sitk.GetImageFromArray(sitk.GetArrayFromImage(old) if array is None else array)
    new.SetSpacing(geometry.get("spacing", old.GetSpacing()))
    new.SetOrigin(geometry.get("origin", old.GetOrigin()))
    new.SetDirection(geometry.get("direction", old.GetDirection()))
    sitk.WriteImage(new, str(path))


def voxels(path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def check(**options) -> None:
    check_integrity(load_raw_dataset(901), progress=False, **options)


def test_a_sound_dataset_passes(raw_dataset):
    raw_dataset(labeled=2, channels=2)
    check()


def test_every_problem_of_every_case_is_listed_at_once(raw_dataset):
    writer = raw_dataset(labeled=6, unlabeled=2)
    data = writer.image_file("lab_00").read_bytes()
    writer.image_file("lab_00").write_bytes(data[: len(data) // 2])
    image = voxels(writer.image_file("unl_00"))
    image[3, 4, 5] = np.nan
    change(writer.image_file("unl_00"), array=image)
    change(writer.label_file("lab_01"), array=voxels(writer.label_file("lab_01"))[:-1])
    change(writer.label_file("lab_02"), spacing=(1.0, 1.0, 2.0))
    change(writer.label_file("lab_03"), origin=(5.0, 0.0, 0.0))
    change(writer.label_file("lab_04"), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    change(writer.label_file("lab_05"), array=voxels(writer.label_file("lab_05")) * 7)
    with pytest.raises(DatasetError) as caught:
        check()
    message = str(caught.value)
    for text in (
        "has 7 problems",
        "imagesTr/lab_00_0000.nii.gz: cannot be read",
        "imagesTr/unl_00_0000.nii.gz: 1 voxels are NaN",
        "labelsTr/lab_01.nii.gz: has shape [19, 24, 22]",
        "labelsTr/lab_02.nii.gz: has spacing [2.0, 1.0, 1.0] mm",
        "labelsTr/lab_03.nii.gz: has origin [5.0, 0.0, 0.0]",
        "labelsTr/lab_04.nii.gz: has direction",
        "labelsTr/lab_05.nii.gz: holds the value 7, 14, which dataset.json does not know",
    ):
        assert text in message


def test_a_file_that_only_lost_its_end_is_found(raw_dataset):
    # SimpleITK reads it without complaint and fills the rest with zeros
    writer = raw_dataset(labeled=2, in_images_un=1)
    file = writer.image_file("more_00", folder="imagesUn")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"more_00_0000.nii.gz: cannot be read"):
        check()


def test_garbage_in_the_first_image_is_reported_like_any_other(raw_dataset):
    writer = raw_dataset(labeled=2)
    writer.image_file("lab_00").write_bytes(gzip.compress(b"no image"))
    with pytest.raises(DatasetError, match=r"1 problem:(.|\n)*lab_00_0000.nii.gz: cannot be read"):
        check()


def test_channels_of_one_case_must_share_a_grid(raw_dataset):
    writer = raw_dataset(labeled=2, channels=2)
    change(writer.image_file("unl_00", 1), origin=(0.0, 9.0, 0.0))
    with pytest.raises(DatasetError, match=r"unl_00_0001.nii.gz: has origin .* and imagesTr/unl_00_0000.nii.gz"):
        check()


def test_a_missing_channel_is_listed_with_the_other_problems(raw_dataset):
    writer = raw_dataset(labeled=2, channels=2)
    writer.image_file("lab_01", 1).unlink()
    writer.image_file("unl_00", 0).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"lab_01_0001.nii.gz: is missing(.|\n)*unl_00_0000.nii.gz: cannot be read"):
        check()


def test_the_rounding_of_headers_is_tolerated(raw_dataset):
    writer = raw_dataset(labeled=2)
    change(writer.label_file("lab_00"), origin=(0.001, 0.0, 0.0), spacing=(1.00001, 1.0, 1.0))
    check()


def test_the_ignore_label_is_a_known_value(raw_dataset):
    raw_dataset(labeled=2, labels={"background": 0, "liver": 1, "ignore": 2})
    check()


def test_labels_outside_the_budget_are_not_opened(raw_dataset):
    writer = raw_dataset(labeled=3)
    writer.label_file("lab_02").write_bytes(b"poison")
    check_integrity(load_raw_dataset(901).with_labeled(["lab_00"]), progress=False)


def test_cases_that_passed_are_not_read_again_until_they_change(raw_dataset, tmp_path, monkeypatch):
    writer = raw_dataset(labeled=2, unlabeled=1, in_images_un=0)
    passed = tmp_path / "passed.json"
    read = []
    original = integrity.check_case
    monkeypatch.setattr(
        integrity, "check_case", lambda case, *rest: read.append(case.identifier) or original(case, *rest)
    )
    check(passed_file=passed)
    check(passed_file=passed)
    assert read == ["lab_00", "lab_01", "unl_00"]
    change(writer.label_file("lab_01"), origin=(50.0, 0.0, 0.0))
    for _ in range(2):
        with pytest.raises(DatasetError, match="lab_01"):
            check(passed_file=passed)
    assert read[3:] == ["lab_01", "lab_01"]


def test_a_long_list_of_problems_is_cut_and_counted(raw_dataset, monkeypatch):
    monkeypatch.setattr("lgssl_nnunet.problems.MAX_LISTED", 2)
    writer = raw_dataset(labeled=4, unlabeled=0)
    for index in range(4):
        writer.image_file(f"lab_{index:02d}").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"and 2 more"):
        check()
