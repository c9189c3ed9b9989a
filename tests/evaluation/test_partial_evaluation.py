"""References that annotate only some of the classes: what is measured, what is left out, and that it is said."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.cli import evaluate as command
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.evaluation.evaluate import evaluate
from lgssl_nnunet.evaluation.metrics import NOT_ANNOTATED, NOT_ANNOTATED_POLICY
from lgssl_nnunet.evaluation.report.report import report

LABELS = {"background": 0, "liver": 1, "tumour": 2}
REGIONS = {"background": 0, "organ": [1, 2], "tumour": 2}
PARTIAL = {"annotated": {"siteA": ["liver"]}, "groups": {"siteA": ["a", "b*", "not in the folder"]}}


def save(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array.astype(np.uint8)), str(file))


def describe(folder: Path, labels=LABELS, **entries) -> None:
    content = {"labels": labels, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}, **entries}
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def folders(tmp_path):
    """Liver and tumour in three cases; the predictions are a voxel off."""
    reference, prediction = tmp_path / "labelsTs", tmp_path / "out"
    for number, case in enumerate(("a", "b1", "c")):
        array = np.zeros((8, 8, 8))
        array[1 : 4 + number], array[6:8] = 1, 2
        save(reference / f"{case}.nii.gz", array)
        save(prediction / f"{case}.nii.gz", np.roll(array, 1, axis=0))
    describe(prediction)
    return reference, prediction


def here(reference: Path, prediction: Path, **options):
    return evaluate(reference, prediction, num_processes=0, progress=False, **options)


def test_annotated_as_a_list_is_refused(folders):
    describe(folders[1], annotated=["a"])
    with pytest.raises(DatasetError, match="'annotated' is not an object"):
        here(*folders)


def test_a_class_that_a_case_does_not_annotate_is_left_out_of_everything(folders):
    complete = here(*folders)
    describe(folders[1], **PARTIAL)
    found = here(*folders)
    left_out = {(r.case, r.name) for r in found["cases"] if r.status == NOT_ANNOTATED}
    assert left_out == {("a", "tumour"), ("b1", "tumour")}
    both = zip(complete["cases"], found["cases"], strict=True)
    assert all(one == other for one, other in both if (other.case, other.name) not in left_out)
    liver, tumour = found["classes"]
    assert liver == complete["classes"][0]
    (c,) = (r for r in complete["cases"] if (r.case, r.name) == ("c", "tumour"))
    assert (tumour.dice, tumour.cases, tumour.not_annotated, tumour.both_empty) == (c.dice, 1, 2, 0)
    assert (tumour.lesions, tumour.hd95) == (c.lesions_reference, c.hd95)
    assert found["dice"] == pytest.approx((liver.dice + c.dice) / 2)


def test_the_files_say_nothing_of_it_and_the_tables_say_so(folders, capsys):
    describe(folders[1], **PARTIAL)
    assert command.main([*map(str, folders), "-np", "0"]) == 0
    text = capsys.readouterr().out
    assert NOT_ANNOTATED_POLICY in text
    header, *rows = (line.split() for line in text.splitlines()[:4])
    assert header[-2:] == ["not", "annotated"]
    assert [row[-1] for row in rows[1:]] == ["0", "2"]
    summary = json.loads((folders[1] / "summary.json").read_text())
    metrics = [entry["metrics"]["2"] for entry in summary["metric_per_case"]]
    assert [all(math.isnan(value) for value in m.values()) for m in metrics] == [True, True, False]
    assert summary["mean"]["2"] == metrics[2]
    with (folders[1] / "summary_per_case.csv").open(newline="") as stream:
        table = [row for row in csv.DictReader(stream) if row["name"] == "tumour"]
    empty = {name for name, value in table[0].items() if not value}
    assert empty == set(table[0]) - {"case", "key", "name", "status"}
    assert [row["status"] for row in table[:2]] == [NOT_ANNOTATED] * 2
    assert float(table[2]["dice"]) > 0
    means = json.loads((folders[1] / "summary_per_class.json").read_text())
    assert means["not_annotated"] == NOT_ANNOTATED_POLICY
    assert [entry.get("not_annotated") for entry in means["classes"]] == [None, 2]


def test_a_class_that_no_reference_annotates_has_no_mean(folders):
    describe(folders[1], annotated={case: ["liver"] for case in ("a", "b1", "c")})
    found = here(*folders)
    liver, tumour = found["classes"]
    assert math.isnan(tumour.dice)
    assert (tumour.cases, tumour.not_annotated) == (0, 3)
    assert found["dice"] == liver.dice
    summary = json.loads((folders[1] / "summary.json").read_text())
    assert summary["mean"]["1"]["Dice"] == summary["foreground_mean"]["Dice"] == pytest.approx(liver.dice)
    assert math.isnan(summary["mean"]["2"]["Dice"])


@pytest.mark.parametrize(("labels", "annotated"), [(LABELS, "tumour"), (REGIONS, "tumour"), (REGIONS, "organ")])
def test_wrong_values_in_classes_not_annotated_change_no_result(folders, labels, annotated):
    reference, prediction = folders
    order = {"regions_class_order": [1, 2]} if labels is REGIONS else {}
    describe(prediction, labels, annotated={"a": [annotated]}, **order)
    before = here(*folders)
    label = sitk.GetArrayFromImage(sitk.ReadImage(str(reference / "a.nii.gz")))
    noise = np.random.default_rng(0)
    if annotated == "organ":
        wrong = np.where(label > 0, noise.integers(1, 3, label.shape), 0)
    else:
        wrong = np.where(label == 2, 2, noise.integers(0, 2, label.shape))
    save(reference / "a.nii.gz", wrong)
    after = here(*folders)
    # Equal as texts, since nan is not equal to itself.
    assert repr(after["cases"]) == repr(before["cases"])
    assert repr(after["classes"]) == repr(before["classes"])
    assert any(r.status == NOT_ANNOTATED for r in after["cases"])


def test_an_impossible_declaration_is_refused(folders):
    describe(folders[1], annotated={"a": ["livr"]})
    with pytest.raises(DatasetError, match="names livr, which is no class of labels"):
        here(*folders)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({}, None),
        (PARTIAL, "1 reference(s) that 'annotated' of dataset.json does not name count as annotated completely: c. If"),
        ({**PARTIAL, "annotated": {"siteA": ["liver"], "c": ["liver", "tumour"]}}, None),
        ({"annotated": {"a": ["liver"]}}, None),
    ],
)
def test_cases_that_annotated_does_not_name_are_told(folders, caplog, entries, told):
    describe(folders[1], **entries)
    here(*folders, surface_metrics=False)
    warnings = [record.getMessage() for record in caplog.records if "does not name" in record.getMessage()]
    assert len(warnings) == (told is not None)
    assert all(told in warning for warning in warnings)


def test_the_report_says_it(folders, tmp_path):
    describe(folders[1], **PARTIAL)
    report(folders[1], reference=folders[0], output=tmp_path / "report.html", num_processes=0)
    text = (tmp_path / "report.html").read_text()
    assert f"{NOT_ANNOTATED_POLICY} This concerns 2 cases." in text
    assert "tumour: not annotated" in text
