"""Evaluating the cases of one group of dataset.json, and the classes that predictions hold."""

from __future__ import annotations

import html
import json
import re
import shlex
import warnings

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.cli import evaluate as evaluate_command
from lgssl_nnunet.cli import report as report_command
from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.evaluation.evaluate import evaluate
from lgssl_nnunet.evaluation.part import name_for_group
from lgssl_nnunet.evaluation.report.report import report
from lgssl_nnunet.inference.predict import RECORD

MERGED = {
    "labels": {"background": 0, "liver": 1, "spleen": 2, "kidney": 3},
    "file_ending": ".nii.gz",
    "channel_names": {"0": "CT"},
    "annotated": {"A": ["liver", "spleen"], "B": ["kidney", "liver"]},
    "groups": {"A": ["A_*"], "B": ["B_1", "B_2"], "all of b/x": ["B_*"]},
}


CLASSES = {name: value for name, value in MERGED["labels"].items() if value}


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


def page_of(folders, **options):
    return report(folders[1], reference=folders[0], num_processes=0, **options)


def describe(folders, **entries):
    """Write another dataset.json beside the predictions; an entry that is None is left out."""
    content = {key: value for key, value in {**MERGED, **entries}.items() if value is not None}
    (folders[1] / "dataset.json").write_text(json.dumps(content))


def hold_only(folders, *classes):
    """Write predictions as `lgssl_predict --classes` does."""
    reference, prediction = folders
    (prediction / RECORD).write_text(json.dumps({"settings": {"classes": classes}}))
    for file in reference.iterdir():
        save(prediction / file.name, *(value if name in classes else 0 for name, value in CLASSES.items()))


def command_on(file):
    """Return the command of the report that is named on its page."""
    code = re.search(r"Command of this report</dt>\s*<dd>\s*<code>(.*?)</code>", file.read_text(encoding="utf-8"))
    return shlex.split(html.unescape(code[1]))


def cells(file):
    """Return the texts in the tables of a report."""
    return [html.unescape(text) for text in re.findall(r"<td[^>]*>([^<]*)</td>", file.read_text(encoding="utf-8"))]


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
    assert re.fullmatch(r"summary_all_of_b_x_[0-9a-f]{8}\.json", results["summary_file"].name)


@pytest.mark.parametrize("record", [[1], "x", {"settings": []}, {"settings": {"classes": "spleen"}}])
def test_a_record_that_tells_no_classes_limits_none(folders, record):
    (folders[1] / RECORD).write_text(json.dumps(record))
    assert [mean.name for mean in here(folders)["classes"]] == ["liver", "spleen", "kidney"]


def test_no_two_groups_have_one_file(folders):
    groups = ["北京", "東京", "a/b", "a_b", "a b", "per_case", "per_class", "A", "A_per_class", "Süd-1.5", ".", "/"]
    groups += [letter * 300 for letter in "北東"]
    describe(folders, groups={group: ["A_*"] for group in groups}, annotated=None)
    results = [here(folders), *(here(folders, group=group) for group in groups)]
    files = [result[kind] for result in results for kind in ("summary_file", "cases_file", "classes_file")]
    assert len(set(files)) == len(files) == len([file for file in folders[1].glob("summary*") if file.is_file()])
    names = {file.name for file in files}
    assert {"summary_北京.json", "summary_a_b.json", "summary_A_per_class.json", "summary_Süd-1.5.json"} <= names
    pages = {name_for_group("lgssl_report.html", group) for group in groups}
    assert len(pages) == len(groups)


def test_only_the_group_has_to_be_predicted(folders):
    for case in ("B_1", "B_2"):
        (folders[1] / f"{case}.nii.gz").unlink()
    assert here(folders, group="A")["dice"] == 1
    with pytest.raises(DatasetError, match=r"out holds no prediction of a case of group B; choose a group that has"):
        here(folders, group="B")
    for case in ("A_1", "A_2"):
        (folders[0] / f"{case}.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"labelsTs holds no reference of a case of group A; choose a group that"):
        here(folders, group="A")


def test_a_group_that_is_not_there_is_refused_by_name(folders, tmp_path):
    with pytest.raises(UsageError, match=r"--group C: dataset\.json has no such group; it has A, B, all of b/x"):
        here(folders, group="C")
    (tmp_path / "bare.json").write_text(json.dumps({k: v for k, v in MERGED.items() if k != "groups"}))
    with pytest.raises(UsageError, match="it has none; name the raw dataset's with -djfile"):
        here(folders, group="A", dataset_json=tmp_path / "bare.json")


def test_classes_that_were_not_to_be_written_are_not_missed(folders):
    hold_only(folders, "spleen")
    assert [(mean.name, mean.dice) for mean in here(folders, group="A")["classes"]] == [("spleen", 1)]
    assert [mean.name for mean in here(folders)["classes"]] == ["spleen"]
    with pytest.raises(UsageError, match=r"holds spleen only and B has kidney, liver; predict those classes"):
        here(folders, group="B")


def test_of_two_names_for_one_region_a_group_may_annotate_either(folders):
    labels = {"background": 0, "whole": [1, 2], "all": [1, 2], "core": [2], "kidney": 3}
    annotated = {"A": ["whole"], "B": ["core"]}
    describe(folders, labels=labels, regions_class_order=[1, 1, 2, 3], annotated=annotated)
    assert [len(here(folders, group=group)["classes"]) for group in "AB"] == [1, 1]
    (folders[1] / RECORD).write_text(json.dumps({"settings": {"classes": ["whole"]}}))
    assert [mean.name for mean in here(folders)["classes"]] == ["all"]


def test_a_record_without_classes_changes_nothing(folders):
    (folders[1] / RECORD).write_text(json.dumps({"settings": {"step_size": 0.5}}))
    assert len(here(folders)["classes"]) == 3


def test_predictions_of_classes_that_no_reference_annotates_are_refused(folders):
    hold_only(folders, "kidney")
    for case in ("B_1", "B_2"):
        (folders[0] / f"{case}.nii.gz").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match=r"out: nothing can be measured, .* kidney .* liver, spleen"):
            here(folders)
    assert not list(folders[1].glob("summary*"))


def test_a_group_whose_cases_annotate_other_classes_is_refused(folders):
    describe(folders, annotated={"A": ["spleen"], "A_1": ["liver"], "A_2": ["kidney", "liver"]})
    with pytest.raises(UsageError, match=r"nothing can be measured, .* spleen .* liver, kidney"):
        here(folders, group="A")


def test_a_case_in_two_annotated_groups_is_refused_where_it_is_evaluated(folders):
    describe(folders, groups={**MERGED["groups"], "B": ["B_*", "A_1", "A_x"]})
    with pytest.raises(DatasetError, match=r"1 problem:\n.*case A_1: is in the groups A, B; name the case itself"):
        here(folders, group="A")
    with pytest.raises(DatasetError, match=r"1 problem:\n.*case A_1: is in the groups A, B"):
        here(folders)
    assert here(folders, group="all of b/x")["dice"]
    describe(
        folders, groups={**MERGED["groups"], "B": ["B_*", "A_1"]}, annotated={**MERGED["annotated"], "A_1": ["liver"]}
    )
    assert here(folders)["dice"]


@pytest.mark.parametrize("groups", [["A"], {"A": None}, {"A": "nothing*"}, {"A": [1]}, "A"])
@pytest.mark.parametrize("measure", [here, page_of])
def test_groups_of_another_form_are_refused_where_they_are_asked_for(folders, groups, measure):
    describe(folders, groups=groups, annotated=None)
    with pytest.raises(DatasetError, match="'groups' is not an object that gives a list of texts for each name"):
        measure(folders, group="A")


@pytest.mark.parametrize("groups", [["A"], "A", 5])
def test_groups_of_another_form_mean_nothing_where_nobody_asks_for_them(folders, groups):
    describe(folders, groups=groups, annotated=None)
    assert here(folders)["dice"]


# ---------------------------------------------------------------------------------------------------------- the report


def test_a_report_measures_what_evaluation_measures_of_predictions_that_hold_some_classes(folders):
    hold_only(folders, "spleen")
    reference, prediction = map(str, folders)
    assert evaluate_command.main([reference, prediction, "-np", "0"]) == 0
    assert report_command.main([prediction, "-ref", reference, "-np", "0"]) == 0
    means = json.loads((folders[1] / "summary_per_class.json").read_text())["classes"]
    assert [(mean["name"], mean["dice"]) for mean in means] == [("spleen", 1)]
    page = folders[1] / "lgssl_report.html"
    assert "spleen" in cells(page)
    assert not {"liver", "kidney"}.intersection(cells(page))
    assert "The predictions hold spleen only" in page.read_text()


def test_a_report_of_nothing_that_can_be_measured_names_the_users_folder(folders):
    hold_only(folders, "kidney")
    with pytest.raises(UsageError, match=f"^{re.escape(str(folders[1]))}: nothing can be measured"):
        page_of(folders, group="A")


def test_each_group_has_a_report_that_its_command_makes_again(folders):
    reference, prediction = map(str, folders)
    for group in "AB":
        evaluating = [reference, prediction, "--group", group, "--report", "--tolerance", "3", "-np", "0"]
        assert evaluate_command.main(evaluating) == 0
        reporting = [prediction, "-ref", reference, "--group", group, "-np", "0", "-o", f"{prediction}/{group}.html"]
        assert report_command.main(reporting) == 0
        assert command_on(folders[1] / f"lgssl_report_{group}.html") == ["lgssl_evaluate", *evaluating]
    pages = {group: folders[1] / f"{group}.html" for group in "AB"}
    for group, page in pages.items():
        text, before = page.read_text(), cells(page)
        assert {cell for cell in before if re.fullmatch("[AB]_[12]", cell)} == {f"{group}_1", f"{group}_2"}
        assert ("spleen" in before, "kidney" in before) == (group == "A", group == "B")
        assert f"This page is about the cases of the group {group} of dataset.json only" in text
        assert f"group {group}</h1>" in text
        command = command_on(page)
        page.unlink()
        assert report_command.main([*command[1:], "-np", "0"]) == 0
        assert cells(page) == before


def test_a_report_of_a_group_goes_to_its_own_file_and_needs_its_cases_only(folders):
    for case in ("B_1", "B_2"):
        (folders[1] / f"{case}.nii.gz").unlink()
    assert page_of(folders, group="A").name == "lgssl_report_A.html"
    assert "have no prediction" not in (folders[1] / "lgssl_report_A.html").read_text()
    with pytest.raises(DatasetError, match=r"out holds no prediction of a case of group B"):
        page_of(folders, group="B")
    with pytest.raises(UsageError, match=r"--group C: dataset\.json has no such group"):
        page_of(folders, group="C")
    with pytest.raises(UsageError, match=r"--cases B_1: there is no such prediction"):
        page_of(folders, group="A", cases=["B_1"])
