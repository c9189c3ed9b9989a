"""Evaluating the cases of one group of dataset.json, and the classes that predictions hold."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.evaluation.evaluate import evaluate
from lgssl_nnunet.inference.predict import RECORD

MERGED = {
    "labels": {"background": 0, "liver": 1, "spleen": 2, "kidney": 3},
    "file_ending": ".nii.gz",
    "channel_names": {"0": "CT"},
    "annotated": {"A": ["liver", "spleen"], "B": ["kidney", "liver"]},
    "groups": {"A": ["A_*"], "B": ["B_1", "B_2"], "all of b/x": ["B_*"]},
}


def save(file, *values):
    """Write a segmentation with a slab of each value, one beside the other."""
    array = np.zeros((8, 4, 4), dtype=np.uint8)
    array[: len(values)] = np.array(values)[:, None, None]
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))


@pytest.fixture
def folders(tmp_path):
    """Two datasets' test cases; each reference lacks what its dataset does not annotate, predictions hold all."""
    reference, prediction = tmp_path / "labelsTs", tmp_path / "out"
    for case, values in (("A_1", (1, 2, 0)), ("A_2", (1, 2, 0)), ("B_1", (1, 0, 3)), ("B_2", (1, 0, 0))):
        save(reference / f"{case}.nii.gz", *values)
        save(prediction / f"{case}.nii.gz", 1, 2, 3)
    (prediction / "dataset.json").write_text(json.dumps(MERGED))
    return reference, prediction


def here(folders, **options):
    return evaluate(*folders, num_processes=0, progress=False, surface_metrics=False, **options)


def test_a_group_is_measured_by_its_own_cases_and_classes(folders):
    first, second = (here(folders, group=group) for group in "AB")
    assert [(mean.name, mean.dice, mean.cases) for mean in first["classes"]] == [("liver", 1, 2), ("spleen", 1, 2)]
    assert [(mean.name, mean.dice, mean.cases) for mean in second["classes"]] == [("liver", 1, 2), ("kidney", 0.5, 2)]
    assert {result.case for result in second["cases"]} == {"B_1", "B_2"}
    assert first["summary_file"].name == "summary_A.json"
    assert second["cases_file"].name == "summary_B_per_case.csv"
    assert list(json.loads(first["summary_file"].read_text())["mean"]) == ["1", "2"]


def test_a_group_that_annotates_everything_has_all_classes_and_a_name_for_files(folders):
    results = here(folders, group="all of b/x")
    assert [mean.name for mean in results["classes"]] == ["liver", "spleen", "kidney"]
    assert results["summary_file"].name == "summary_all_of_b_x.json"


def test_only_the_group_has_to_be_predicted(folders):
    for case in ("B_1", "B_2"):
        (folders[1] / f"{case}.nii.gz").unlink()
    assert here(folders, group="A")["dice"] == 1
    with pytest.raises(DatasetError, match=r"lacks 2 of 2 cases|nothing to compare"):
        here(folders, group="B")


def test_a_group_that_is_not_there_is_refused_by_name(folders, tmp_path):
    with pytest.raises(UsageError, match=r"--group C: dataset\.json has no such group; it has A, B, all of b/x"):
        here(folders, group="C")
    (tmp_path / "bare.json").write_text(json.dumps({k: v for k, v in MERGED.items() if k != "groups"}))
    with pytest.raises(UsageError, match="it has none; name the raw dataset's with -djfile"):
        here(folders, group="A", dataset_json=tmp_path / "bare.json")


def test_classes_that_were_not_to_be_written_are_not_missed(folders):
    prediction = folders[1]
    (prediction / RECORD).write_text(json.dumps({"settings": {"classes": ["spleen"]}}))
    for case in ("A_1", "A_2", "B_1", "B_2"):
        save(prediction / f"{case}.nii.gz", 0, 2, 0)
    assert [(mean.name, mean.dice) for mean in here(folders, group="A")["classes"]] == [("spleen", 1)]
    assert [mean.name for mean in here(folders)["classes"]] == ["spleen"]
    with pytest.raises(UsageError, match=r"holds spleen only and B has kidney, liver; predict those classes"):
        here(folders, group="B")


def test_a_record_without_classes_changes_nothing(folders):
    (folders[1] / RECORD).write_text(json.dumps({"settings": {"step_size": 0.5}}))
    assert len(here(folders)["classes"]) == 3
