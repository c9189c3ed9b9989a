"""`annotated` and `groups` of dataset.json: what they say, what is wrong with them, and what is read of a label."""

from __future__ import annotations

import json
import pickle

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.data.partial_labels import PartialLabel
from lgssl_nnunet.errors import DatasetError, PlansError, SplitError
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.fingerprint import dataset_fingerprint
from lgssl_nnunet.plans.partial_labels import annotated_classes, missing_classes, partial_labels
from lgssl_nnunet.plans.preprocessing import unprepared_cases
from lgssl_nnunet.plans.sparse_annotation import sparse_annotation

LABELS = {"background": 0, "liver": 1, "spleen": 2, "kidney": 3, "ignore": 4}
REGIONS = {"background": 0, "kidney with tumour": [1, 2, 3], "kidney tumour": [2, 3], "kidney cyst": 3}


def declare(writer, **entries) -> None:
    writer.content.update(entries)
    writer.write_json()


def problems_of(writer) -> list[str]:
    return [str(problem) for problem in load_raw_dataset(901).problems]


# ------------------------------------------------------------------------------------------------------- declarations


def test_a_case_has_the_classes_of_its_group_unless_it_is_named_itself(raw_dataset):
    writer = raw_dataset(labeled=5, unlabeled=1)
    declare(
        writer,
        annotated={"siteA": ["liver"], "lab_01": ["spleen"], "lab_03": ["spleen", "liver"], "unl_00": ["liver"]},
        groups={"siteA": ["lab_0[01]", "lab_02", "lab_03", "test_*"], "siteB": ["lab_04"]},
    )
    dataset = load_raw_dataset(901)
    assert dataset.problems == ()
    assert partial_labels(dataset) == {"lab_00": ("liver",), "lab_01": ("spleen",), "lab_02": ("liver",)}
    assert partial_labels(dataset.with_labeled(["lab_01", "lab_04"])) == {"lab_01": ("spleen",)}


def test_patterns_know_capital_letters_and_test_cases_belong_to_groups():
    content = {"labels": LABELS, "annotated": {"A": ["kidney", "liver"]}, "groups": {"A": ["Case_?", "a[1]"]}}
    assert annotated_classes(content, ["Case_1", "case_2", "a[1]"]) == dict.fromkeys(
        ("Case_1", "a[1]"), ("liver", "kidney")
    )


def test_without_annotated_nothing_is_partial_and_groups_may_be_anything(raw_dataset):
    declare(raw_dataset(labeled=1), groups=["of another tool"])
    dataset = load_raw_dataset(901)
    assert dataset.problems == ()
    assert partial_labels(dataset) == {}


@pytest.mark.parametrize("entries", [{"annotated": ["lab_00"]}, {"annotated": {"A": ["liver"]}, "groups": ["A"]}])
def test_lists_instead_of_objects_are_told_by_planning(entries, raw_dataset, plan_tiny):
    declare(raw_dataset(labeled=2, unlabeled=1), **entries)
    with pytest.raises(DatasetError, match="is not an object that gives a list of texts for each name; correct it"):
        plan_tiny()


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"anotated": {"lab_00": ["liver"]}}, "the key 'anotated' means nothing; is 'annotated' meant?"),
        ({"groups": {"siteA": ["lab_00"]}}, "'groups' but no 'annotated': every labelled case counts as annotated"),
    ],
)
def test_what_would_be_left_out_in_silence_is_named(entries, words, raw_dataset, caplog):
    declare(raw_dataset(labeled=1), **entries)
    load_raw_dataset(901)
    assert words in caplog.text


def test_everything_wrong_is_told_at_once_with_the_other_problems(raw_dataset, plan_tiny):
    writer = raw_dataset(labeled=4, unlabeled=1)
    writer.image_file("unl_00").rename(writer.image_file("unl_00", channel=3))
    declare(
        writer,
        annotated={
            "siteA": ["liver"],
            "siteB": ["spleen"],
            "lab_03": ["livr", "background"],
            "lab_9": ["liver"],
            "lab_02": [],
            "lab_01": ["liver"],
        },
        groups={"siteA": ["lab_*"], "siteB": ["lab_00", "lab_01"], "empty": [], "typo": ["lab_x"], "lab_02": ["unl_*"]},
    )
    with pytest.raises(DatasetError) as refused:
        plan_tiny()
    said = str(refused.value)
    for part in (
        "9 problems",
        "unl_00_0000.nii.gz: is missing",
        "annotated lab_03: names livr, background, which is no class of labels; choose among liver, spleen",
        "annotated lab_9: is neither a case nor a group",
        "annotated lab_02: names no class",
        "groups empty: has no case; list identifiers",
        "groups typo: has no case lab_x",
        "groups lab_02: is also the name of a case",
        "case lab_00: is in the groups siteA, siteB",
    ):
        assert part in said, part
    assert "case lab_01: is in the groups" not in said  # named itself


@pytest.mark.parametrize(
    ("entries", "which"),
    [
        ({"annotated": ["lab_00"]}, "'annotated'"),
        ({"annotated": {"lab_00": "liver"}}, "'annotated'"),
        ({"annotated": {"lab_00": [1]}}, "'annotated'"),
        ({"annotated": {}, "groups": {"A": "lab_00"}}, "'groups'"),
    ],
)
def test_other_forms_are_refused(raw_dataset, entries, which):
    writer = raw_dataset(labeled=1)
    declare(writer, **entries)
    assert [which in problem for problem in problems_of(writer)] == [True]


def test_regions_are_annotated_by_their_names(raw_dataset):
    writer = raw_dataset(labeled=2, labels=REGIONS, regions_class_order=[1, 2, 3])
    declare(writer, annotated={"lab_00": ["kidney with tumour", "kidney cyst"]})
    assert problems_of(writer) == []
    assert partial_labels(load_raw_dataset(901)) == {"lab_00": ("kidney with tumour", "kidney cyst")}


# ------------------------------------------------------------------------------------------------------------- budgets


def test_a_class_that_nothing_teaches_is_named():
    partial = {"a": ["liver"], "b": ["liver", "spleen"]}
    assert missing_classes(LABELS, partial, ["a"]) == ["spleen", "kidney"]
    assert missing_classes(LABELS, partial, ["a", "b"]) == ["kidney"]
    assert missing_classes(LABELS, partial, ["a", "complete"]) == []


def test_a_budget_without_a_class_is_refused(raw_dataset, plan_tiny, tmp_path):
    writer = raw_dataset(labeled=3)
    declare(writer, annotated={"lab_00": ["liver"], "lab_01": ["liver"]})
    (tmp_path / "two.txt").write_text("lab_00\nlab_01\n")
    with pytest.raises(SplitError, match=r"none of the 2 labelled cases .* annotates spleen: .*--seed.*--labeled_list"):
        plan_tiny(labeled_list=tmp_path / "two.txt", preprocess=False)


def test_plans_name_the_partially_annotated_cases_of_the_budget(raw_dataset, plan_tiny, tmp_path):
    writer = raw_dataset(labeled=4)
    declare(writer, annotated={"lab_00": ["liver"], "lab_01": ["spleen"]})
    (tmp_path / "some.txt").write_text("lab_01\nlab_03\n")
    plans = [
        json.loads(plan_tiny(preprocess=False, **o).read_text()) for o in ({}, {"labeled_list": tmp_path / "some.txt"})
    ]
    assert [p["lgssl"]["partial_labels"] for p in plans] == [
        {"lab_00": ["liver"], "lab_01": ["spleen"]},
        {"lab_01": ["spleen"]},
    ]


def test_sparse_annotation_is_refused(raw_dataset, plan_tiny):
    declare(raw_dataset(labeled=2), annotated={"lab_00": ["liver"]})
    plan_tiny()
    with pytest.raises(PlansError, match="annotate only some of the classes"):
        sparse_annotation(901, num_processes=0, progress=False)


# ----------------------------------------------------------------------------------------------------- what is read


def test_values_of_classes_not_annotated_are_read_as_0_and_the_ignore_label_stays():
    reading = PartialLabel.of(LABELS, ["spleen"])
    np.testing.assert_array_equal(reading.read(np.arange(5)), [0, 0, 2, 0, 4])
    assert reading.count_hidden(np.array([0, 1, 1, 2, 3, 4])) == 3
    assert [reading.hides(label) for label in (1, 2, 3)] == [True, False, True]


def test_only_annotated_regions_decide_what_is_read():
    reading = PartialLabel.of(REGIONS, ["kidney tumour"])
    np.testing.assert_array_equal(reading.read(np.arange(4)), [0, 0, 2, 2])  # core tells 2 from 1, and not from 3
    assert reading.count_hidden(np.array([1, 2, 3, 1])) == 2
    assert [reading.hides(key) for key in ((1, 2, 3), [2, 3], 3)] == [True, False, True]
    np.testing.assert_array_equal(
        PartialLabel.of(REGIONS, ["kidney with tumour", "kidney cyst"]).read(np.arange(4)), [0, 1, 1, 3]
    )


def relabel(writer, case: str, change) -> None:
    """Write another label map for a case, with the time stamp of the old file changed as well."""
    file = writer.label_file(case)
    image = sitk.ReadImage(str(file))
    changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)).astype(np.uint8))
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(file), True)


def poison(values, known):
    """A change of label maps that puts `values` at random where no `known` value is."""

    def change(label: np.ndarray) -> np.ndarray:
        anything = np.random.default_rng(3).choice([0, *values], label.shape)
        return np.where(np.isin(label, known), label, anything)

    return change


def everything_made(preprocessed) -> dict:
    """Content of all that planning made of the labels, without times and sizes of raw files."""
    plans = json.loads((preprocessed / "LGSSLCPUPlans.json").read_text())
    content = {
        "plans": plans,
        "fingerprint": json.loads((preprocessed / "dataset_fingerprint_LGSSLCPUPlans.json").read_text()),
    }
    prints = json.loads((preprocessed / "integrity.manifest.json").read_text())["cases"]
    content["prints"] = {case: list(found.values())[-1] for case, found in prints.items()}
    folder = preprocessed / "LGSSLCPUPlans_3d_fullres"
    for file in sorted(folder.iterdir()):
        array = file.suffix == ".b2nd"
        content[file.name] = file.read_bytes() if array else pickle.loads(file.read_bytes())
    return content


VARIANTS = {
    "classes": ({"labels": {"background": 0, "liver": 1, "spleen": 2}}, ["liver"], [2], [1]),
    "regions": ({"labels": REGIONS, "regions_class_order": [1, 2, 3]}, ["kidney tumour"], [1], [2, 3]),
}


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.5)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stock", [False, True])
def test_wrong_values_in_classes_not_annotated_change_nothing_to_the_bit(
    raw_dataset, plan_tiny, data_root, same, caplog, variant, spacing, stock, monkeypatch
):
    content, annotated, wrong, known = VARIANTS[variant]
    if stock:
        from lgssl_nnunet.plans import preprocessing

        monkeypatch.setattr(preprocessing, "recipe_of", lambda *arguments: None)
    writer = raw_dataset(labeled=3, unlabeled=1, geometry={"spacing": spacing}, **content)
    declare(writer, annotated={"lab_00": annotated, "lab_01": annotated})
    for case in ("lab_00", "lab_01"):
        relabel(writer, case, lambda label: np.where(np.isin(label, known), label, 0))
    preprocessed = data_root / "nnUNet_preprocessed" / writer.folder.name
    plan_tiny()
    clean = everything_made(preprocessed)
    assert "hold classes" not in caplog.text
    for case in ("lab_00", "lab_01"):
        relabel(writer, case, poison(wrong, known))
    plan_tiny()
    assert [record.args[0] for record in caplog.records if "hold classes" in record.msg] == ["lab_00", "lab_01"]
    assert same(clean, everything_made(preprocessed))


def test_regions_within_an_annotated_one_change_nothing_either(raw_dataset, plan_tiny, data_root, same, caplog):
    writer = raw_dataset(labeled=3, unlabeled=1, labels=REGIONS, regions_class_order=[1, 2, 3])
    declare(writer, annotated={"lab_00": ["kidney with tumour"]})
    relabel(writer, "lab_00", lambda label: (label > 0) * 3)
    preprocessed = data_root / "nnUNet_preprocessed" / writer.folder.name
    plan_tiny()
    clean = everything_made(preprocessed)
    relabel(
        writer, "lab_00", lambda label: np.where(label > 0, np.random.default_rng(1).choice([1, 2, 3], label.shape), 0)
    )
    plan_tiny()
    assert same(clean, everything_made(preprocessed))
    assert "hold classes" not in caplog.text  # within an annotated region they are no mistake


def locations(preprocessed, case):
    properties = pickle.loads((preprocessed / "LGSSLCPUPlans_3d_fullres" / f"{case}.pkl").read_bytes())
    return {key: len(places) for key, places in properties["class_locations"].items()}


def test_places_are_noted_of_annotated_regions_only(raw_dataset, plan_tiny, data_root):
    writer = raw_dataset(labeled=2, labels=REGIONS, regions_class_order=[1, 2, 3])
    for case in ("lab_00", "lab_01"):
        relabel(
            writer, case, lambda label: np.where(label > 0, np.random.default_rng(1).choice([1, 2, 3], label.shape), 0)
        )
    declare(writer, annotated={"lab_00": ["kidney tumour"]})
    plan_tiny()
    preprocessed = data_root / "nnUNet_preprocessed" / writer.folder.name
    found = locations(preprocessed, "lab_00")
    assert found[(1, 2, 3)] == found[3] == 0 < found[(2, 3)]
    assert min(locations(preprocessed, "lab_01").values()) > 0


def test_what_a_case_annotates_decides_whether_it_is_done(raw_dataset, plan_tiny, data_root, monkeypatch):
    from lgssl_nnunet.plans import fingerprint, preprocessing

    writer = raw_dataset(labeled=3, unlabeled=0, in_images_un=0)
    preprocessed = data_root / "nnUNet_preprocessed" / writer.folder.name
    runs, redone = [], []
    extract, one = fingerprint.extract_fingerprint, preprocessing.preprocess_case
    measured = extract(load_raw_dataset(901), progress=False)  # other intensities would be a reason to redo all cases
    monkeypatch.setattr(fingerprint, "extract_fingerprint", lambda *a, **k: runs.append(1) or measured)
    monkeypatch.setattr(preprocessing, "preprocess_case", lambda c, *r: redone.append(c.identifier) or one(c, *r))
    states = [
        (None, ["lab_00", "lab_01", "lab_02"], 1),
        ({"lab_00": ["liver"]}, ["lab_00"], 1),
        ({"lab_00": ["liver"], "lab_01": ["liver", "spleen"]}, [], 0),  # which is complete
        ({"lab_00": ["spleen"]}, ["lab_00"], 1),
        ({}, ["lab_00"], 1),
    ]
    before = None
    for annotated, expected, fingerprints in states:
        if annotated is not None:
            declare(writer, annotated=annotated)
        redone.clear()
        runs.clear()
        now = json.loads(plan_tiny().read_text())
        assert (redone, len(runs)) == (expected, fingerprints), annotated
        assert unprepared_cases(preprocessed, now, "3d_fullres", writer.content) == []
        if before is not None:
            assert unprepared_cases(preprocessed, before, "3d_fullres", writer.content) == expected
        before = now


def test_the_fingerprint_has_no_intensities_of_classes_not_annotated(raw_dataset, tmp_path):
    writer = raw_dataset(labeled=1)
    key = "foreground_intensity_properties_per_channel"
    means = []
    for number, classes in enumerate((["liver", "spleen"], ["liver"])):  # boxes of about 15 and 20
        declare(writer, annotated={"lab_00": classes})
        found, values = dataset_fingerprint(load_raw_dataset(901), tmp_path / f"{number}.json", progress=False)
        assert values == {1, 2} - ({2} if number else set())
        means.append(found[key]["0"]["mean"])
    assert means[1] < means[0] - 1


def test_a_class_of_which_no_case_has_a_voxel_is_told_and_noted(raw_dataset, plan_tiny, caplog):
    writer = raw_dataset(labeled=2)
    declare(writer, annotated={"lab_00": ["liver"]})  # whose voxels of the spleen say nothing
    label = sitk.ReadImage(str(writer.label_file("lab_01")))
    sitk.WriteImage(label * sitk.Cast(label != 2, label.GetPixelID()), str(writer.label_file("lab_01")))
    assert json.loads(plan_tiny(preprocess=False).read_text())["lgssl"]["unseen_classes"] == ["spleen"]
    assert "None of the 2 labelled cases has a voxel of spleen: a model cannot learn it" in caplog.text
    caplog.clear()
    declare(writer, annotated={})
    assert "unseen_classes" not in json.loads(plan_tiny(preprocess=False).read_text())["lgssl"]
    assert "has a voxel" not in caplog.text


def test_stored_labels_hold_annotated_classes_only(raw_dataset, plan_tiny, data_root):
    writer = raw_dataset(labeled=2)
    declare(writer, annotated={"lab_00": ["liver"]})
    plan_tiny()
    folder = data_root / "nnUNet_preprocessed" / writer.folder.name / "LGSSLCPUPlans_3d_fullres"
    stored = [set(np.unique(blosc2.open(str(folder / f"lab_0{n}_seg.b2nd"))[:])) - {-1} for n in (0, 1)]
    assert stored == [{0, 1}, {0, 1, 2}]
