from __future__ import annotations

import pytest

from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.plans.cases import find_reader, held_out_cases, load_raw_dataset


def problems_of(dataset: int) -> str:
    return "\n".join(str(problem) for problem in load_raw_dataset(dataset).problems)


def test_labelled_unlabelled_and_test_cases_are_told_apart(raw_dataset):
    raw_dataset(labeled=2, unlabeled=1, in_images_un=1, test=1)
    dataset = load_raw_dataset(901)
    assert list(dataset.labeled) == ["lab_00", "lab_01"]
    assert list(dataset.unlabeled) == ["more_00", "unl_00"]
    assert dataset.test == ("test_00",)
    assert all(case.label is None for case in dataset.unlabeled.values())
    assert not dataset.problems


def test_cases_in_images_ts_are_known_by_their_images_alone(raw_dataset):
    writer = raw_dataset(test=2, channels=2)
    (writer.folder / "labelsTs").mkdir()
    (writer.folder / "labelsTs" / "test_00.nii.gz").touch()
    dataset = load_raw_dataset(901)
    cases = held_out_cases(dataset.folder, dataset.dataset_json)
    assert tuple(cases) == dataset.test == ("test_00", "test_01")
    assert [path.name for path in cases["test_00"].images] == ["test_00_0000.nii.gz", "test_00_0001.nii.gz"]
    assert all(case.label is None for case in cases.values())


@pytest.mark.parametrize("spelling", [901, "901", "Dataset901_Tiny"])
def test_a_dataset_is_found_by_number_or_name(raw_dataset, spelling):
    raw_dataset()
    assert load_raw_dataset(spelling).name == "Dataset901_Tiny"


def test_an_unknown_dataset_is_refused_with_a_list_of_what_there_is(raw_dataset):
    raw_dataset()
    with pytest.raises(UsageError, match=r"No dataset 77 .* holds: Dataset901_Tiny"):
        load_raw_dataset(77)


def test_a_number_shared_by_two_folders_is_refused(raw_dataset, data_root):
    raw_dataset()
    (data_root / "nnUNet_raw" / "Dataset901_Other").mkdir()
    with pytest.raises(UsageError, match="several folders"):
        load_raw_dataset(901)


def test_cases_left_out_of_the_budget_lose_their_label_file(raw_dataset):
    raw_dataset(labeled=3)
    dataset = load_raw_dataset(901).with_labeled(["lab_01"])
    assert list(dataset.labeled) == ["lab_01"]
    assert {"lab_00", "lab_02"} < set(dataset.unlabeled)
    assert all(case.label is None for case in dataset.unlabeled.values())


def test_the_same_case_in_both_image_folders_is_a_problem(raw_dataset):
    raw_dataset().add("lab_00", labeled=False, folder="imagesUn")
    assert "lab_00: is in imagesTr and in imagesUn" in problems_of(901)


def test_a_label_of_a_case_in_images_un_is_not_used(raw_dataset):
    raw_dataset().add("other", labeled=True, folder="imagesUn")
    assert "other" in load_raw_dataset(901).unlabeled


def test_missing_surplus_and_unnumbered_channels_are_problems(raw_dataset):
    writer = raw_dataset(labeled=2, unlabeled=1, channels=2)
    writer.image_file("lab_01", 1).unlink()
    writer.image_file("lab_00", 0).rename(writer.image_file("lab_00", 5))
    writer.image_file("unl_00", 0).rename(writer.folder / "imagesTr" / "strange.nii.gz")
    found = problems_of(901)
    for text in (
        "lab_01_0001.nii.gz: is missing",
        "lab_00_0000.nii.gz: is missing",
        "lab_00_0005.nii.gz: is a channel that dataset.json does not know",
        "strange.nii.gz: has no channel number",
    ):
        assert text in found


def test_a_dataset_without_any_label_is_refused(raw_dataset):
    raw_dataset(labeled=0)
    with pytest.raises(DatasetError, match="at least one labelled case"):
        load_raw_dataset(901)


def test_a_dataset_without_images_is_refused(raw_dataset):
    raw_dataset(labeled=0, unlabeled=0, in_images_un=0, test=0)
    with pytest.raises(DatasetError, match="no image"):
        load_raw_dataset(901)


def test_cases_listed_in_dataset_json_are_read_from_there(raw_dataset):
    writer = raw_dataset(labeled=2, unlabeled=0, in_images_un=1)
    writer.content["dataset"] = {
        "first": {"images": ["imagesTr/lab_00_0000.nii.gz"], "label": "labelsTr/lab_00.nii.gz"},
        "second": {"images": ["imagesTr/lab_01_0000.nii.gz"], "label": "labelsTr/nowhere.nii.gz"},
        "third": {"images": ["imagesTr/nowhere_0000.nii.gz"]},
        "fourth": {"label": "labelsTr/lab_00.nii.gz"},
    }
    writer.write_json()
    dataset = load_raw_dataset(901)
    assert list(dataset.labeled) == ["first"]
    assert list(dataset.unlabeled) == ["more_00", "second", "third"]
    found = problems_of(901)
    assert "nowhere_0000.nii.gz: is listed in dataset.json but does not exist" in found
    assert "case fourth: has no list of images" in found


def test_a_label_without_an_image_is_mentioned(raw_dataset, caplog):
    writer = raw_dataset()
    writer.label_file("lab_00").rename(writer.label_file("typo"))
    load_raw_dataset(901)
    assert "labels without an image" in caplog.text
    assert "typo" in caplog.text


def test_a_wrong_num_training_is_mentioned_and_nothing_more(raw_dataset, caplog):
    raw_dataset(labeled=3, unlabeled=1, numTraining=99)
    assert len(load_raw_dataset(901).labeled) == 3
    assert "numTraining 99" in caplog.text


def test_images_with_another_ending_are_named(raw_dataset):
    writer = raw_dataset(labeled=2)
    writer.content["file_ending"] = ".nii"
    writer.write_json()
    with pytest.raises(DatasetError, match=r"holds no image ending in \.nii, .* it holds files ending in \.nii\.gz"):
        load_raw_dataset(901)


@pytest.mark.parametrize("entry", [5, [], {"images": 5}, {"images": [None]}, {"images": ["a"], "label": 3}])
def test_a_listed_case_that_is_no_list_of_files_is_named(entry, raw_dataset):
    writer = raw_dataset(labeled=1)
    whole = {"images": ["imagesTr/lab_00_0000.nii.gz"], "label": "labelsTr/lab_00.nii.gz"}
    writer.content["dataset"] = {"lab_00": whole, "wrong": entry, "long": {"images": ["x" * 5000]}}
    writer.write_json()
    found = problems_of(901)
    assert "dataset.json, case wrong: has no list of images" in found
    assert f"{'x' * 5000}: is listed in dataset.json but does not exist" in found


@pytest.mark.parametrize("name", ["np", None, True, ["SimpleITKIO"]])
def test_a_reader_that_is_none_is_named(name, raw_dataset):
    writer = raw_dataset(labeled=1, overwrite_image_reader_writer=name)
    with pytest.raises(DatasetError, match=r"overwrite_image_reader_writer is .*, which is no reader of nnU-Net"):
        find_reader(writer.content, writer.image_file("lab_00"))
