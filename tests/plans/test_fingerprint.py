from __future__ import annotations

import json

import numpy as np
import pytest
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.plans import fingerprint as module
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.fingerprint import dataset_fingerprint, extract_fingerprint


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(module, "TOTAL_SAMPLES", 4000)


def test_keys_and_order_are_those_of_nnunet(raw_dataset):
    raw_dataset(labeled=2, unlabeled=1, in_images_un=1)
    result, _ = extract_fingerprint(load_raw_dataset(901), progress=False)
    assert set(result) == {
        "spacings",
        "shapes_after_crop",
        "foreground_intensity_properties_per_channel",
        "median_relative_size_after_cropping",
    }
    assert len(result["spacings"]) == len(result["shapes_after_crop"]) == 4
    assert set(result["foreground_intensity_properties_per_channel"]["0"]) == {
        "mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5",
    }  # fmt: skip


def test_intensities_are_those_of_nnunet_on_the_labelled_cases(raw_dataset):
    raw_dataset(labeled=2, unlabeled=2)
    dataset = load_raw_dataset(901)
    mine = extract_fingerprint(dataset, progress=False)[0]["foreground_intensity_properties_per_channel"]["0"]
    reader = module.find_reader(dataset.dataset_json, dataset.labeled["lab_00"].images[0])
    drawn = [
        DatasetFingerprintExtractor.analyze_case([str(case.images[0])], str(case.label), reader, 2000)[2][0]
        for case in dataset.labeled.values()
    ]
    assert mine["mean"] == float(np.mean(np.concatenate(drawn)))
    assert mine["percentile_99_5"] == float(np.percentile(np.concatenate(drawn), np.array([99.5]))[0])


def test_samples_per_case_depend_on_the_labelled_cases_alone(raw_dataset):
    writer = raw_dataset(labeled=2, unlabeled=0, in_images_un=0)
    before, _ = extract_fingerprint(load_raw_dataset(901), progress=False)
    writer.add("zusatz", labeled=False)
    after, _ = extract_fingerprint(load_raw_dataset(901), progress=False)
    key = "foreground_intensity_properties_per_channel"
    assert before[key] == after[key]
    assert len(after["spacings"]) == len(before["spacings"]) + 1


def test_it_is_made_again_only_when_files_or_budget_change(raw_dataset, tmp_path, monkeypatch):
    writer = raw_dataset(labeled=3)
    file = tmp_path / "dataset_fingerprint_X.json"
    runs = []
    original = module.extract_fingerprint
    monkeypatch.setattr(module, "extract_fingerprint", lambda *a, **k: runs.append(1) or original(*a, **k))

    def fingerprint(labeled=("lab_00", "lab_01"), **options):
        return dataset_fingerprint(load_raw_dataset(901).with_labeled(labeled), file, progress=False, **options)

    first, values = fingerprint()
    assert fingerprint() == (first, values) == (json.loads(file.read_text()), {1, 2})
    assert len(runs) == 1
    writer.label_file("lab_02").write_bytes(b"a label outside the budget")
    fingerprint()
    assert len(runs) == 1
    fingerprint(labeled=("lab_00",))
    fingerprint(labeled=("lab_00",), clean=True)
    writer.add("unl_00", labeled=False, shape=(18, 18, 18))
    fingerprint(labeled=("lab_00",))
    assert len(runs) == 4
    manifest = file.with_name("dataset_fingerprint_X.manifest.json")
    manifest.write_text(json.dumps({"key": json.loads(manifest.read_text())["key"]}))  # as older versions wrote it
    fingerprint(labeled=("lab_00",))
    assert len(runs) == 5


def test_labelled_cases_without_foreground_are_refused(raw_dataset):
    writer = raw_dataset(labeled=1)
    from SimpleITK import GetArrayFromImage, GetImageFromArray, ReadImage, WriteImage

    file = str(writer.label_file("lab_00"))
    WriteImage(GetImageFromArray(GetArrayFromImage(ReadImage(file)) * 0), file)
    with pytest.raises(DatasetError, match="has a foreground voxel"):
        extract_fingerprint(load_raw_dataset(901), progress=False)


def test_an_unreadable_image_is_named(raw_dataset):
    raw_dataset(labeled=1).image_file("unl_01").write_bytes(b"")
    with pytest.raises(DatasetError, match="unl_01"):
        extract_fingerprint(load_raw_dataset(901), progress=False)
