from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.plans import integrity
from lgssl_nnunet.plans.cases import Case, load_raw_dataset
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


def check(**options) -> list[list[str]]:
    return check_integrity(load_raw_dataset(901), progress=False, **options)


@pytest.fixture
def files_read(monkeypatch) -> list[str]:
    """The names of the files that are read from now on, in order."""
    read = []
    original = integrity._read
    monkeypatch.setattr(
        integrity, "_read", lambda path, *rest, **kw: read.append(path.name) or original(path, *rest, **kw)
    )
    return read


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


def test_twins_in_training_are_named_once_and_returned(raw_dataset, caplog):
    writer = raw_dataset(labeled=3, unlabeled=1)
    shutil.copy(writer.image_file("lab_00"), writer.image_file("unl_00"))
    shutil.copy(writer.label_file("lab_01"), writer.label_file("lab_02"))
    image = voxels(writer.image_file("lab_00"))
    noise = np.random.default_rng(0).normal(0, 0.1 * image.std(), image.shape)
    change(writer.image_file("more_00", folder="imagesUn"), array=(2 * (image + noise)).astype(np.float32))
    pairs = [["lab_00", "more_00"], ["lab_00", "unl_00"], ["lab_01", "lab_02"], ["more_00", "unl_00"]]
    assert check() == pairs
    warnings = [record.getMessage() for record in caplog.records if "the same scan" in record.getMessage()]
    assert len(warnings) == len(pairs)
    assert "Dataset901_Tiny: lab_00 and more_00 (nearly equal images, correlation 0.99" in warnings[0]
    assert "lab_00 and unl_00 (equal images)" in warnings[1]
    assert "lab_01 and lab_02 (equal labels)" in warnings[2]


def test_a_dataset_without_twins_has_none(raw_dataset, caplog):
    raw_dataset(labeled=6, unlabeled=4, in_images_un=3, test=4)
    assert check() == []
    assert "same scan" not in caplog.text


@pytest.mark.parametrize(("case", "folder"), [("lab_01", "imagesTr"), ("unl_00", "imagesTr"), ("more_00", "imagesUn")])
def test_a_twin_in_training_of_a_test_case_is_refused(raw_dataset, case, folder):
    writer = raw_dataset(labeled=2, unlabeled=1, in_images_un=1, test=2)
    shutil.copy(writer.image_file(case, folder=folder), writer.image_file("test_01", folder="imagesTs"))
    with pytest.raises(DatasetError) as caught:
        check()
    message = str(caught.value)
    assert "has 1 problem" in message
    assert f"imagesTs/test_01: is a test or validation case and a twin of the training case {case} (equal im" in message
    assert "remove one of the two" in message
    assert "--no_verify" in message


def test_a_test_case_may_have_the_name_of_a_training_case(raw_dataset):
    writer = raw_dataset(labeled=2, test=0)
    writer.add("lab_01", folder="imagesTs", labeled=False, shape=(20, 20, 20))
    check()
    shutil.copy(writer.image_file("lab_00"), writer.image_file("lab_01", folder="imagesTs"))
    with pytest.raises(DatasetError, match=r"imagesTs/lab_01: is .* twin of the training case lab_00"):
        check()


def test_twins_among_test_cases_alone_are_nobodys_business(raw_dataset):
    writer = raw_dataset(labeled=2, test=2)
    shutil.copy(writer.image_file("test_00", folder="imagesTs"), writer.image_file("test_01", folder="imagesTs"))
    assert check() == []


def test_held_out_cases_can_be_given_and_their_labels_stay_closed(raw_dataset):
    writer = raw_dataset(labeled=3, unlabeled=1, test=1)
    shutil.copy(writer.image_file("lab_00"), writer.image_file("lab_02"))
    writer.label_file("lab_02").write_bytes(b"poison")
    dataset = load_raw_dataset(901)
    held_out = {"lab_02": dataset.labeled["lab_02"], "gone": Case("gone", (writer.image_file("gone"),))}
    training = dataset.with_labeled(["lab_00", "lab_01"])
    training.unlabeled.pop("lab_02")
    with pytest.raises(DatasetError, match=r"imagesTr/lab_02: is .* twin of the training case lab_00"):
        check_integrity(training, held_out=held_out, progress=False)
    assert check_integrity(training, held_out={}, progress=False) == []


def test_an_unreadable_test_image_is_a_warning(raw_dataset, caplog):
    writer = raw_dataset(labeled=2, channels=2, test=2)
    writer.image_file("test_00", folder="imagesTs").write_bytes(b"poison")
    change(writer.image_file("test_01", 1, "imagesTs"), array=np.zeros((3, 4, 5), np.float32))
    assert check() == []
    assert "imagesTs/test_00_0000.nii.gz: cannot be read" in caplog.text
    assert "test_01: could not be checked" in caplog.text
    assert "not known whether it has a twin" in caplog.text


def test_labels_of_unlabeled_and_test_cases_are_not_opened_for_prints(raw_dataset, files_read):
    writer = raw_dataset(labeled=2, unlabeled=1, in_images_un=1, test=1)
    for folder, case in (("labelsTr", "more_00"), ("labelsTs", "test_00")):
        (writer.folder / folder).mkdir(exist_ok=True)
        (writer.folder / folder / f"{case}.nii.gz").write_bytes(b"poison")
    check_integrity(load_raw_dataset(901).with_labeled(["lab_00"]), progress=False)
    assert sorted(name for name in files_read if "_0000" not in name) == ["lab_00.nii.gz"]


def test_prints_of_unchanged_cases_come_from_the_manifest(raw_dataset, tmp_path, files_read):
    writer = raw_dataset(labeled=2, unlabeled=1, in_images_un=0, test=1)
    shutil.copy(writer.image_file("lab_00"), writer.image_file("unl_00"))
    passed = tmp_path / "passed.json"
    first = check(passed_file=passed)
    assert len(files_read) == 6
    files_read.clear()
    assert check(passed_file=passed) == first == [["lab_00", "unl_00"]]
    assert files_read == []
    shutil.copy(writer.image_file("lab_01"), writer.image_file("test_00", folder="imagesTs"))
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"test_00: is .* twin of the training case lab_01"):
            check(passed_file=passed)
    assert files_read == ["test_00_0000.nii.gz"]


def test_other_budgets_do_not_push_each_other_out_of_the_manifest(raw_dataset, tmp_path, files_read):
    raw_dataset(labeled=2, unlabeled=0, in_images_un=0, test=0)
    dataset, passed = load_raw_dataset(901), tmp_path / "passed.json"
    for _ in range(2):
        check_integrity(dataset, passed_file=passed, progress=False)
        check_integrity(dataset.with_labeled(["lab_00"]), passed_file=passed, progress=False)
    assert len(files_read) == 5


@pytest.mark.parametrize(
    "content", ['{"lab_00": ["key"], "version": ["old"]}', '{"version": 1, "cases": {}}', "[]", "{"]
)
def test_a_manifest_of_another_version_is_made_again(raw_dataset, tmp_path, content):
    raw_dataset(labeled=2)
    passed = tmp_path / "passed.json"
    passed.write_text(content)
    check(passed_file=passed)
    assert "lab_00" in json.loads(passed.read_text())["cases"]


def test_prints_are_the_same_from_worker_processes(raw_dataset, tmp_path):
    raw_dataset(labeled=2, unlabeled=0, in_images_un=0)
    manifests = [tmp_path / "here.json", tmp_path / "workers.json"]
    for manifest, processes in zip(manifests, (0, 1), strict=True):
        check(passed_file=manifest, num_processes=processes)
    assert manifests[0].read_text() == manifests[1].read_text()


def test_an_image_whose_axes_are_no_numbers_is_found(raw_dataset):
    file = raw_dataset(labeled=2).image_file("unl_00")
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[300:304] = np.float32(np.nan).tobytes()
    file.write_bytes(gzip.compress(content))
    with pytest.raises(DatasetError, match=r"unl_00_0000\.nii\.gz: has direction \[.*nan.*correct its header"):
        check()
