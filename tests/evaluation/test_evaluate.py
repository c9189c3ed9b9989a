"""Folders of segmentations against references: nnU-Net's summary, our table per case, and refusals."""

from __future__ import annotations

import csv
import json
import logging
import math
import multiprocessing.pool
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.cli import evaluate as command
from lgssl_nnunet.errors import DatasetError, PlansError
from lgssl_nnunet.evaluation.evaluate import evaluate

LABELS = {"background": 0, "liver": 1, "tumour": 2}
REGIONS = {"background": 0, "organ": [1, 2], "tumour": 2, "ignore": 3}


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(np.asarray(array, dtype=np.uint8)), str(file))


def cube(**boxes):
    """An 8x8x8 background with boxes: label name l1 -> slices."""
    array = np.zeros((8, 8, 8), dtype=np.uint8)
    for label, box in boxes.items():
        array[box] = int(label[1:])
    return array


@pytest.fixture
def folders(tmp_path):
    """Three cases: a overlaps in part, b lacks the tumour in the prediction, c has no tumour at all."""
    reference, prediction = tmp_path / "labelsTs", tmp_path / "out"
    save(reference / "a.nii.gz", cube(l1=np.s_[0:4], l2=np.s_[6:8]))
    save(prediction / "a.nii.gz", cube(l1=np.s_[2:6], l2=np.s_[6:8]))
    save(reference / "b.nii.gz", cube(l1=np.s_[0:4], l2=np.s_[6:8]))
    save(prediction / "b.nii.gz", cube(l1=np.s_[0:4]))
    save(reference / "c.nii.gz", cube(l1=np.s_[0:4]))
    save(prediction / "c.nii.gz", cube(l1=np.s_[0:2]))
    describe(prediction, LABELS)
    return reference, prediction


def describe(folder, labels, order=None):
    content = {"labels": labels, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps({**content, "regions_class_order": order} if order else content))
    (folder / "plans.json").write_text(json.dumps({"label_manager": "LabelManager"}))


def here(reference, prediction, **options):
    return evaluate(reference, prediction, num_processes=0, progress=False, **options)


def test_dice_and_jaccard_agree_with_hand_counts(folders):
    results = here(*folders)
    found = {(r.case, r.name): (r.dice, r.jaccard) for r in results["cases"]}
    assert found["a", "liver"] == (pytest.approx(2 * 2 / 8), pytest.approx(2 / 6))
    assert found["a", "tumour"] == (1.0, 1.0)
    assert found["b", "tumour"] == (0.0, 0.0)
    assert found["c", "liver"] == (pytest.approx(2 / 3), pytest.approx(1 / 2))
    assert math.isnan(found["c", "tumour"][0])
    liver, tumour = results["classes"]
    assert liver.dice == pytest.approx((0.5 + 1 + 2 / 3) / 3)
    assert (tumour.dice, tumour.cases, tumour.both_empty, tumour.one_empty) == (0.5, 2, 1, 1)
    assert results["dice"] == pytest.approx((liver.dice + tumour.dice) / 2)


@pytest.mark.parametrize("regions", [False, True])
def test_the_summary_is_nnunets_to_the_byte(folders, tmp_path, monkeypatch, regions):
    from nnunetv2.evaluation import evaluate_predictions as nnunet

    reference, prediction = folders
    if regions:
        describe(prediction, REGIONS, order=[1, 2])
        save(reference / "a.nii.gz", cube(l1=np.s_[0:4], l2=np.s_[6:8], l3=np.s_[4:5]))
    threads = SimpleNamespace(Pool=multiprocessing.pool.ThreadPool)
    monkeypatch.setattr(nnunet.multiprocessing, "get_context", lambda kind: threads)
    files = [str(prediction / name) for name in ("dataset.json", "plans.json")]
    nnunet.compute_metrics_on_folder2(str(reference), str(prediction), *files, str(tmp_path / "theirs.json"), 1)
    ours = here(reference, prediction)["summary_file"]
    assert ours == prediction / "summary.json"
    assert ours.read_text() == (tmp_path / "theirs.json").read_text()


def test_regions_carry_their_names_and_ignored_voxels_do_not_count(folders):
    reference, prediction = folders
    describe(prediction, REGIONS, order=[1, 2])
    for name in "abc":
        save(reference / f"{name}.nii.gz", cube(l1=np.s_[0:4], l3=np.s_[4:8]))
        save(prediction / f"{name}.nii.gz", cube(l1=np.s_[0:3], l2=np.s_[3:8]))
    organ, tumour = here(reference, prediction)["classes"]
    assert (organ.name, organ.key, organ.dice) == ("organ", "(1, 2)", 1.0)
    assert (tumour.name, tumour.dice, tumour.one_empty) == ("tumour", 0.0, 3)


def test_the_table_per_case_lies_beside_the_summary(folders, tmp_path):
    results = here(*folders, output=tmp_path / "new" / "test.json")
    assert results["cases_file"] == tmp_path / "new" / "test_per_case.csv"
    rows = list(csv.DictReader(results["cases_file"].open()))
    assert len(rows) == 6
    assert rows[3] | {"dice": "", "jaccard": ""} == {
        "case": "b",
        "key": "2",
        "name": "tumour",
        "dice": "",
        "jaccard": "",
        "n_reference": "128",
        "n_prediction": "0",
        "status": "prediction empty",
        "volume_similarity": "0.0",
    }


def test_a_class_that_is_nowhere_is_no_warning_and_no_nan_in_our_mean(folders, recwarn):
    reference, prediction = folders
    describe(prediction, {**LABELS, "cyst": 3})
    results = here(reference, prediction)
    assert math.isnan(results["summary"]["foreground_mean"]["Dice"])
    assert not math.isnan(results["dice"])
    assert [w for w in recwarn if issubclass(w.category, RuntimeWarning)] == []


def test_every_missing_prediction_is_named_unless_chill(folders, caplog):
    reference, prediction = folders
    (prediction / "a.nii.gz").unlink()
    (prediction / "c.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"lacks 2 of 3 cases: a\.nii\.gz, c\.nii\.gz; .*--chill"):
        here(reference, prediction)
    with caplog.at_level(logging.WARNING):
        results = here(reference, prediction, chill=True)
    assert {result.case for result in results["cases"]} == {"b"}
    assert "No prediction for 2 of 3 cases" in caplog.text


def test_predictions_without_reference_are_named_and_left_out(folders, caplog):
    reference, prediction = folders
    (reference / "a.nii.gz").unlink()
    assert {result.case for result in here(reference, prediction)["cases"]} == {"b", "c"}
    assert "No reference for 1 predictions, left out: a.nii.gz" in caplog.text


def test_cases_that_cannot_be_compared_are_told_together(folders):
    reference, prediction = folders
    save(prediction / "a.nii.gz", np.zeros((8, 8, 7)))
    save(prediction / "b.nii.gz", np.full((8, 8, 8), 7))
    (prediction / "c.nii.gz").write_bytes(b"nothing")
    with pytest.raises(DatasetError) as error:
        here(reference, prediction)
    message = str(error.value)
    assert "3 case(s) cannot be compared" in message
    assert "a.nii.gz has 8 x 8 x 7 voxels" in message
    assert "b.nii.gz holds labels that dataset.json does not know: [7" in message
    assert "c.nii.gz cannot be read" in message


def test_missing_folders_descriptions_and_matches_are_refused(folders, tmp_path):
    reference, prediction = folders
    with pytest.raises(DatasetError, match="is no folder"):
        here(tmp_path / "nowhere", prediction)
    with pytest.raises(DatasetError, match="nothing to compare"):
        here(reference, prediction, dataset_json={"labels": LABELS, "file_ending": ".nrrd"})
    with pytest.raises(DatasetError, match=r"ends in \.json"):
        here(reference, prediction, output=tmp_path / "x.csv")
    (prediction / "dataset.json").unlink()
    with pytest.raises(PlansError, match=r"dataset\.json is missing; name it with -djfile"):
        here(reference, prediction)


def test_without_plans_the_labels_are_read_as_nnunet_does(folders):
    reference, prediction = folders
    (prediction / "plans.json").unlink()
    assert [mean.name for mean in here(reference, prediction)["classes"]] == ["liver", "tumour"]


def test_every_flag_of_the_command_reaches_the_function(monkeypatch, capsys):
    import lgssl_nnunet.evaluation.evaluate as module

    seen = {}
    results = {"classes": [], "summary_file": "S.json", "cases_file": "S.csv"}
    monkeypatch.setattr(
        module, "evaluate", lambda *folders, **options: seen.update(options, folders=folders) or results
    )
    words = "-djfile D -pfile P -o S.json -np 3 --chill"
    assert command.main(["REFERENCE", "PREDICTION", *words.split()]) == 0
    assert seen == {
        "folders": ("REFERENCE", "PREDICTION"),
        "dataset_json": "D",
        "plans": "P",
        "output": "S.json",
        "num_processes": 3,
        "chill": True,
    }
    assert capsys.readouterr().out.endswith("Written: S.json, S.csv\n")


def test_the_command_prints_the_table_and_where_the_files_are(folders, capsys):
    assert command.main([*map(str, folders), "-np", "0"]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[2].split() == ["liver", "1", "0.7222", "0.6111", "3", "0", "0"]
    assert "summary_per_case.csv" in output


def test_the_command_refuses_in_one_message(folders, capsys):
    (folders[1] / "a.nii.gz").unlink()
    assert command.main([*map(str, folders), "-np", "0"]) == 2
    error = capsys.readouterr().err
    assert "lacks 1 of 3 cases" in error
    assert "Traceback" not in error
