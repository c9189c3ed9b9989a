"""Several raw datasets become one: files, labels, dataset.json, refusals, and what a second call does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.cli import merge_datasets as command
from lgssl_nnunet.errors import DatasetError, UsageError
from lgssl_nnunet.evaluation.evaluate import evaluate
from lgssl_nnunet.evaluation.metrics import NOT_ANNOTATED
from lgssl_nnunet.locks import FolderBusyError, lock_beside
from lgssl_nnunet.plans import merge as module
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.merge import merge_datasets

FIRST = {"background": 0, "liver": 1, "postcava": 2}
SECOND = {"background": 0, "spleen": 1, "inferior vena cava": 2, "hepar": 3}
CHANGED = {0: 0, 1: 3, 2: 2, 3: 1}
A, B = "Dataset901_Tiny", "Dataset902_Tiny"


def here(*arguments, **options):
    return merge_datasets(*arguments, num_processes=0, progress=False, **options)


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def description(folder):
    return json.loads((folder / "dataset.json").read_text())


@pytest.fixture
def two(raw_dataset):
    """Two datasets with a class in common under two names, a test label each."""
    first = raw_dataset(labeled=2, unlabeled=1, labels=FIRST)
    second = raw_dataset(labeled=2, unlabeled=1, number=902, labels=SECOND)
    for file in (second.label_file("lab_00"), second.label_file("lab_01")):
        label = sitk.ReadImage(str(file))
        label[0, 0, 0], label[1, 0, 0], label[2, 0, 0] = 1, 2, 3
        sitk.WriteImage(label, str(file))
    for writer in (first, second):
        (writer.folder / "labelsTs").mkdir()
        label = writer.label_file("lab_00").read_bytes()
        (writer.folder / "labelsTs" / "test_00.nii.gz").write_bytes(label)
    return first, second


@pytest.mark.parametrize("entries", [{"annotated": ["lab_00"]}, {"annotated": {"A": ["liver"]}, "groups": ["A"]}])
def test_lists_where_objects_belong_are_told_with_the_other_problems(entries, two):
    two[0].content.update(entries)
    two[0].write_json()
    with pytest.raises(DatasetError, match="is not an object that gives a list of texts for each name"):
        here([901, 902], 903)


def test_all_cases_are_there_under_names_that_tell_where_they_are_from(two):
    merged = here([901, 902], 903)
    assert merged.name == "Dataset903_Merged"
    for dataset in (A, B):
        assert (merged / "imagesTr" / f"{dataset}_lab_01_0000.nii.gz").is_file()
        assert (merged / "imagesTr" / f"{dataset}_unl_00_0000.nii.gz").is_file()
        assert (merged / "imagesUn" / f"{dataset}_more_00_0000.nii.gz").is_file()
        assert (merged / "imagesTs" / f"{dataset}_test_00_0000.nii.gz").is_file()
        assert (merged / "labelsTs" / f"{dataset}_test_00.nii.gz").is_file()
    names = {folder: sorted(file.name for file in (merged / folder).iterdir()) for folder in ("labelsTr", "imagesUn")}
    assert names["labelsTr"] == [f"{dataset}_lab_0{n}.nii.gz" for dataset in (A, B) for n in (0, 1)]
    provenance = json.loads((merged / "provenance.json").read_text())
    assert len(provenance) == 10
    assert provenance[f"{B}_more_00"] == {"dataset": B, "case": "more_00"}


def test_dataset_json_has_the_union_of_classes_and_who_annotates_which(two):
    content = description(here([901, 902], "Dataset903_Abdomen"))
    assert content["name"] == "Abdomen"
    assert content["labels"] == {"background": 0, "liver": 1, "postcava": 2, "spleen": 3}
    assert content["annotated"] == {A: ["liver", "postcava"], B: ["liver", "postcava", "spleen"]}
    assert content["groups"] == {A: [f"{A}_*"], B: [f"{B}_*"]}
    assert content["numTraining"] == 4
    assert content["channel_names"] == {"0": "CT"}
    assert content["merged"]["classes"][B] == {"spleen": "spleen", "inferior vena cava": "postcava", "hepar": "liver"}


def test_files_are_linked_and_only_labels_whose_values_change_are_written_anew(two):
    first, second = two
    merged = here([901, 902], 903)
    written = {file.name for file in merged.glob("*/*.nii.gz") if not file.is_symlink()}
    assert written == {f"{B}_lab_00.nii.gz", f"{B}_lab_01.nii.gz", f"{B}_test_00.nii.gz"}
    link = merged / "labelsTr" / f"{A}_lab_00.nii.gz"
    assert link.resolve() == first.label_file("lab_00").resolve()
    for name in ("lab_00", "lab_01"):
        before, after = second.label_file(name), merged / "labelsTr" / f"{B}_{name}.nii.gz"
        old = read(before)
        assert set(np.unique(old)) == {0, 1, 2, 3}
        assert np.array_equal(read(after), np.vectorize(CHANGED.get)(old))
        images = [sitk.ReadImage(str(file)) for file in (before, after)]
        assert images[0].GetOrigin() == images[1].GetOrigin()
        assert images[0].GetSpacing() == images[1].GetSpacing()


def test_labels_that_can_be_linked_and_all_images_stay_closed(two):
    first, second = two
    closed = [*first.folder.rglob("*.nii.gz"), *second.folder.glob("images*/*.nii.gz")]
    for file in closed:
        file.write_bytes(b"nobody reads this")
    merged = here([901, 902], 903)
    assert (merged / "labelsTs" / f"{A}_test_00.nii.gz").read_bytes() == b"nobody reads this"


def test_copies_are_made_where_links_do_not_work(two):
    merged = here([901, 902], 903, copy=True)
    assert not [file for file in merged.rglob("*") if file.is_symlink()]
    image = merged / "imagesTr" / f"{A}_lab_00_0000.nii.gz"
    assert image.read_bytes() == two[0].image_file("lab_00").read_bytes()


def test_the_merged_dataset_is_planned(two, plan_tiny):
    here([901, 902], 903)
    plans = json.loads(plan_tiny(903, preprocess=False).read_text())
    assert len(plans["lgssl"]["split"]["labeled"]) == 4
    assert len(plans["lgssl"]["split"]["unlabeled"]) == 4
    assert [prompt.rpartition(" a")[2] for prompt in plans["lgssl"]["text"]["prompts"]] == [
        " background", " liver", "n inferior vena cava", " spleen",
    ]  # fmt: skip


def test_a_second_call_does_only_what_is_new_and_removes_what_is_gone(two, monkeypatch, caplog):
    first, second = two
    second.add("lab_02")
    here([901, 902], 903)
    done = []
    whole = module.merge_case
    monkeypatch.setattr(module, "merge_case", lambda case, *rest: done.append(case.identifier) or whole(case, *rest))
    assert here([901, 902], 903) == here([901, 902], "Dataset903_Merged")
    assert done == []
    first.add("lab_07")
    second.label_file("lab_00").unlink()
    second.image_file("lab_01").unlink()
    second.label_file("lab_01").unlink()
    merged = here([901, 902], 903)
    assert sorted(done) == [f"{A}_lab_07", f"{B}_lab_00"]
    assert not (merged / "labelsTr" / f"{B}_lab_00.nii.gz").exists()
    assert not [file for file in merged.rglob("*") if file.name.startswith(f"{B}_lab_01")]
    assert f"{B}_lab_01" not in json.loads((merged / "provenance.json").read_text())
    assert description(merged)["numTraining"] == 4


def test_an_interrupted_merge_continues(two, monkeypatch):
    whole, done = module.merge_case, []

    def interrupted(case, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(case.identifier)
        return whole(case, *rest)

    monkeypatch.setattr(module, "merge_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        here([901, 902], 903)
    monkeypatch.setattr(module, "merge_case", lambda case, *rest: done.append(case.identifier) or whole(case, *rest))
    merged = here([901, 902], 903)
    assert len(done) == len(set(done)) == 10
    assert (merged / "dataset.json").is_file()


def test_a_folder_with_something_else_is_refused(two, raw_dataset, files_below):
    raw_dataset(labeled=1, number=904, labels=FIRST)
    merged = here([901, 902], 903)
    before = files_below(merged.parent)
    for datasets, output, options, message in (
        ([901, 902], 904, {}, r"Dataset904_Tiny: has the id 904 already; choose another id with -o"),
        ([901, 902], "Dataset904_Tiny", {}, r"Dataset904_Tiny: holds another dataset"),
        ([901, 904], 903, {}, r"was merged from other datasets or with other classes or channels; remove it"),
        ([901, 902], 903, {"keep_apart": ["liver"]}, r"was merged from other datasets or with other classes"),
        ([901, 902], "x", {}, r"-o x: give an id such as 600"),
        ([901, 901], 903, {}, r"-d 901 901: give two or more datasets, each once"),
        ([901, A], 903, {}, r"each once"),
        ([901], 903, {}, r"give two or more"),
    ):
        with pytest.raises(UsageError, match=message):
            here(datasets, output, **options)
    assert files_below(merged.parent) == before


def test_a_folder_that_somebody_writes_to_is_refused(two, data_root, held_elsewhere):
    target = data_root / "nnUNet_raw" / "Dataset903_Merged"
    with held_elsewhere(lock_beside(target, "conversion")), pytest.raises(FolderBusyError):
        here([901, 902], 903)


def test_everything_that_does_not_fit_is_told_at_once_and_nothing_is_written(raw_dataset, data_root):
    raw_dataset(labeled=1, labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    second = raw_dataset(labeled=1, number=902, channels=2, labels=FIRST)
    second.image_file("lab_00", 1).unlink()
    third = raw_dataset(labeled=1, number=905, labels=FIRST)
    third.content["file_ending"] = ".mha"
    third.write_json()
    fourth = raw_dataset(labeled=1, number=906, labels={"background": 0, "liver": 2})
    with pytest.raises(DatasetError) as error:
        here([901, 902, 905, 906, 77], 903, same=[["liver", "livr"]])
    message = str(error.value)
    assert message.startswith("The merge into Dataset903_Merged has 6 problems:")
    for part in (
        f"{A}/dataset.json: has the regions whole; give every class one value",
        f"{B}/imagesTr/lab_00_0001.nii.gz: is missing",
        "Dataset905_Tiny/imagesTr: holds no image ending in .mha",
        f"{fourth.folder.name} has 1 problem:\n    dataset.json: label values [0, 2] are not consecutive",
        "No dataset 77 in",
        f"the number of channels differs ({A}: 1, {B}: 2)",
    ):
        assert part in message, part
    assert "livr" not in message  # it may be a class of a dataset that could not be loaded
    assert not (data_root / "nnUNet_raw" / "Dataset903_Merged").exists()


def test_file_endings_that_differ_are_refused(two):
    second = two[1]
    for file in second.folder.rglob("*.nii.gz"):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".mha")))
    second.content["file_ending"] = ".mha"
    second.write_json()
    with pytest.raises(DatasetError, match=r"file_ending differs \(.*: \.nii\.gz, .*: \.mha\); convert the images"):
        here([901, 902], 903)


def channels(raw_dataset, *names, **options):
    """Return the merged dataset.json of datasets with these channel names."""
    for number, own in enumerate(names, 911):
        named = {str(index): name for index, name in enumerate(own)}
        writer = raw_dataset(0, 0, 0, 0, number=number, channels=len(own), channel_names=named, labels=FIRST)
        writer.content["prompts"] = {"liver": "A computerized tomography of a liver"}
        writer.write_json()
        writer.add("case")
    return description(here(list(range(911, 911 + len(names))), 903, **options))


def test_channels_that_nnunet_normalises_alike_are_joined(raw_dataset):
    content = channels(raw_dataset, ["T1", "FLAIR"], ["MRI", "flair"], ["t1", "FLAIR"])
    assert content["channel_names"] == {"0": "T1 or MRI", "1": "FLAIR"}


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        ([["zscore", "zscore"], ["T1", "T2"]], ["zscore", "zscore"]),
        ([["noNorm", "noNorm"], ["noNorm", "zscore"]], ["noNorm", "zscore"]),
        ([["MRI", "MRI"], ["T1", "T2"]], None),
        ([["MRI", "MRI"], ["MRI", "T2"]], None),
    ],
)
def test_a_name_of_several_channels_tells_nothing_of_their_order(raw_dataset, names, asked):
    assert len(channels(raw_dataset, *names, channel_names=asked)["channel_names"]) == 2


def test_ct_and_mri_are_refused_with_the_way_out(raw_dataset):
    with pytest.raises(DatasetError) as error:
        channels(raw_dataset, ["CT"], ["MRI"])
    assert "channel 0 is CT or MRI, which nnU-Net normalises in different ways, but a dataset in one" in str(
        error.value
    )
    assert 'add --channel_names "CT or MRI", by which each image is normalised by itself (z-score)' in str(error.value)
    content = description(here([911, 912], 903, channel_names=["CT or MRI"]))
    assert content["channel_names"] == {"0": "CT or MRI"}
    assert content["prompts"] == {"liver": "liver"}


def test_ct_and_mri_by_the_way_out_are_normalised_by_z_score_with_prompts_that_are_true(raw_dataset, plan_tiny):
    channels(raw_dataset, ["CT"], ["MRI"], channel_names=["CT or MRI"])
    plans = json.loads(plan_tiny(903, preprocess=False).read_text())
    assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert plans["lgssl"]["text"]["prompts"][1] == "A medical image of the liver"


@pytest.mark.parametrize(
    ("names", "asked", "message"),
    [
        ([["CT"], ["MRI"]], ["MRI"], r"the channel name 'MRI' is not true of all images, which are CT or MRI"),
        ([["CT"], ["MRI"]], ["ct"], r"is not true of all images"),
        ([["MRI"], ["zscore"]], None, r"'MRI or zscore' is not true .*such as --channel_names \"zscore\""),
        ([["T1", "T2"], ["T2", "T1"]], None, r"channel 0 is T1 or T2, and one of them is another channel elsewhere"),
        ([["T1", "T2"], ["T2", "T1"]], ["T1 or T2", "T2 or T1"], r"channel 1 is T2 or T1, and one of them is another"),
        ([["CT"], ["CT"]], ["CT", "PET"], r"has 2 names for 1 channels; give one name per channel"),
    ],
)
def test_channel_names_that_are_wrong_for_some_images_are_refused(raw_dataset, names, asked, message):
    with pytest.raises(DatasetError, match=message):
        channels(raw_dataset, *names, channel_names=asked)


def test_one_file_per_channel_does_not_go_with_one_file_for_all(raw_dataset):
    raw_dataset(1, 0, 0, 0, channels=2, labels=FIRST)
    second = raw_dataset(1, 0, 0, 0, number=902, channels=2, labels=SECOND)
    files = [second.image_file("lab_00", channel) for channel in (0, 1)]
    both = sitk.JoinSeries([sitk.ReadImage(str(file)) for file in files])
    sitk.WriteImage(both, str(files[0]))
    files[1].unlink()
    with pytest.raises(DatasetError, match=rf"1 problem:.*\n.* files per case differs \({A}: 2, {B}: 1\); write one"):
        here([901, 902], 903)


@pytest.mark.parametrize("cut", [np.s_[0], np.s_[:1]])
def test_slices_do_not_go_with_volumes(raw_dataset, cut):
    raw_dataset(1, 0, 0, 0, labels=FIRST)
    second = raw_dataset(1, 0, 0, 0, number=902, labels=SECOND)
    for file in second.folder.glob("*/*.nii.gz"):
        sitk.WriteImage(sitk.GetImageFromArray(read(file)[cut]), str(file))
    with pytest.raises(DatasetError, match=rf"1 problem:\n.* number of dimensions differs \({A}: 3, {B}: 2\); merge"):
        here([901, 902], 903)


def test_a_volume_of_one_slice_goes_with_volumes(raw_dataset):
    first = raw_dataset(2, 0, 0, 0, labels=FIRST)
    raw_dataset(1, 0, 0, 0, number=902, labels=FIRST)
    for file in (first.image_file("lab_00"), first.label_file("lab_00")):
        sitk.WriteImage(sitk.ReadImage(str(file))[:, :, :1], str(file))
    here([901, 902], 903)


def test_a_label_with_an_unknown_value_is_named_when_the_others_are_done(two, caplog):
    second = two[1]
    image = sitk.ReadImage(str(second.label_file("lab_01")))
    image[0, 0, 0] = 9
    sitk.WriteImage(image, str(second.label_file("lab_01")))
    with pytest.raises(DatasetError, match=r"1 of 10 cases were not merged(.|\n)*lab_01: .*holds the value 9, which"):
        here([901, 902], 903)
    merged = second.folder.parent / "Dataset903_Merged"
    assert not (merged / "dataset.json").exists()
    image[0, 0, 0] = 0
    sitk.WriteImage(image, str(second.label_file("lab_01")))
    with caplog.at_level("INFO"):
        here([901, 902], 903)
    assert "9 cases are merged already; 1 are to be done." in caplog.text


def test_a_labelled_case_whose_image_lies_in_images_un_keeps_its_label(two):
    first = two[0]
    first.content["dataset"] = {
        name: {"images": [f"../{B}/imagesUn/more_00_0000.nii.gz"], "label": f"labelsTr/{label}.nii.gz"}
        for name, label in (("listed_00", "lab_00"), ("listed_01", "none"))
    }
    first.write_json()
    merged = here([901, 902], 903)
    assert (merged / "imagesTr" / f"{A}_listed_00_0000.nii.gz").is_file()
    assert (merged / "labelsTr" / f"{A}_listed_00.nii.gz").resolve() == first.label_file("lab_00").resolve()
    assert (merged / "imagesUn" / f"{A}_listed_01_0000.nii.gz").is_file()
    assert not list(merged.glob("*.nii.gz"))
    assert f"{A}_listed_00" in load_raw_dataset(903).labeled
    assert description(merged)["numTraining"] == 3


@pytest.mark.parametrize("missing", [0, 1])
def test_a_test_case_without_one_of_its_channels_is_told_with_the_other_problems(raw_dataset, missing, data_root):
    first = raw_dataset(2, 0, 0, 2, channels=2, labels=FIRST)
    second = raw_dataset(2, 0, 0, 1, number=902, channels=2, labels=SECOND)
    first.image_file("test_00", missing, "imagesTs").unlink()
    second.image_file("lab_00", 1).unlink()
    with pytest.raises(DatasetError) as error:
        here([901, 902], 903)
    assert str(error.value).startswith("The merge into Dataset903_Merged has 2 problems:")
    assert f"{A}/imagesTs/test_00_000{missing}.nii.gz: is missing; add this channel or remove the case" in str(
        error.value
    )
    assert not (data_root / "nnUNet_raw" / "Dataset903_Merged").exists()


def test_a_training_case_and_a_test_case_of_one_name_are_refused(two):
    two[0].add("lab_00", labeled=False, folder="imagesTs")
    with pytest.raises(DatasetError, match=f"{A}/lab_00: is a training case and a test case; rename one of the two"):
        here([901, 902], 903)


def test_a_changed_dataset_json_stays_when_the_merge_is_continued(two, caplog):
    caplog.set_level("INFO")
    file = here([901, 902], 903) / "dataset.json"
    content = json.loads(file.read_text())
    here([901, 902], 903)
    assert json.loads(file.read_text()) == content
    assert "keeps what was changed" not in caplog.text
    edits = {
        "labels": {"background": 0, "abdomen": [1, 3], "liver": 1, "postcava": 2, "spleen": 3},
        "regions_class_order": [3, 1, 2, 3],
        "prompts": {"liver": "liver of a child"},
    }
    edited = {key: entry for key, entry in {**content, **edits}.items() if key != "name"}
    file.write_text(json.dumps(edited))
    two[0].add("lab_09")
    counts = {**content["merged"]["cases"], A: {"labeled": 3, "unlabeled": 2, "test": 1}}
    for _ in range(2):
        caplog.clear()
        here([901, 902], 903)
        merged = {**content["merged"], "cases": counts}
        assert json.loads(file.read_text()) == {**edited, "numTraining": 5, "merged": merged}
        assert "dataset.json keeps what was changed in it since the merge: name, labels, prompts" in caplog.text


def test_a_change_of_what_is_to_be_written_anew_is_refused_before_anything_is_written(two, files_below):
    merged = here([901, 902], 903)
    file, content = merged / "dataset.json", description(merged)
    before = files_below(merged.parent)
    two[0].add("lab_09")
    for text, error, message in (
        (json.dumps({**content, "numTraining": 7}), UsageError, r"write anew \(numTraining\); move it away, run the"),
        ("{", DatasetError, r"dataset.json: the file is not valid JSON"),
        ("[]", DatasetError, r"dataset.json: holds no JSON object"),
    ):
        file.write_text(text)
        for dry_run in (True, False):
            with pytest.raises(error, match=message):
                here([901, 902], 903, dry_run=dry_run)
        assert file.read_text() == text
        assert not list(merged.rglob("*lab_09*"))
    file.rename(file.with_name("mine.json"))
    assert description(here([901, 902], 903))["numTraining"] == 5
    assert set(before) < set(files_below(merged.parent))


def test_without_the_copy_nobody_is_told_that_he_changed_what_is_to_be_written_anew(two):
    (here([901, 902], 903) / "merge" / "dataset.json.written").unlink()
    two[0].add("lab_09")
    with pytest.raises(UsageError, match=r"without dataset.json.written your changes cannot be told .*numTraining"):
        here([901, 902], 903)


def test_an_end_between_dataset_json_and_its_copy_changes_nothing(two):
    merged = here([901, 902], 903)
    copy = merged / "merge" / "dataset.json.written"
    earlier = copy.read_bytes()
    two[0].add("lab_09")
    here([901, 902], 903)
    content = description(merged)
    for text in (earlier, None):
        copy.unlink()
        if text is not None:
            copy.write_bytes(text)
        here([901, 902], 903)
        assert description(merged) == content
        assert json.loads(copy.read_text()) == content


def test_parts_of_classes_that_datasets_count_to_the_whole_are_told(raw_dataset, caplog, plan_tiny):
    raw_dataset(1, 0, 0, 0, labels={"background": 0, "liver": 1, "liver tumour": 2})
    raw_dataset(1, 0, 0, 0, number=902, labels={"background": 0, "hepar": 1})
    file = here([901, 902], 903) / "dataset.json"
    assert f"of other datasets: {B} has 'liver' without 'liver tumour'. Where the labels count" in caplog.text
    content = json.loads(file.read_text())
    assert content["annotated"] == {A: ["liver", "liver tumour"], B: ["liver"]}
    content |= {"labels": {"background": 0, "liver": [1, 2], "liver tumour": 2}, "regions_class_order": [1, 2]}
    file.write_text(json.dumps(content))
    plans = json.loads(plan_tiny(903, preprocess=False).read_text())
    assert plans["lgssl"]["partial_labels"] == {f"{B}_lab_00": ["liver"]}


def test_datasets_with_a_part_of_a_joined_class_are_told_and_the_class_can_be_taken_out(raw_dataset, caplog, plan_tiny):
    raw_dataset(1, 0, 0, 0, labels={"background": 0, "left kidney": 1, "right kidney": 2})
    raw_dataset(1, 0, 0, 0, number=902, labels={"background": 0, "left kidney": 1, "liver": 2})
    raw_dataset(1, 0, 0, 0, number=904, labels={"background": 0, "kidney": 1})
    same = [["kidney", "left kidney", "right kidney"]]
    file = here([901, 902, 904], 903, same=same) / "dataset.json"
    assert f"label a part: {B} has only 'left kidney' of 'kidney'. What it lacks counts as background" in caplog.text
    content = json.loads(file.read_text())
    assert content["annotated"][B] == ["kidney", "liver"]
    content["annotated"][B] = ["liver"]
    file.write_text(json.dumps(content))
    here([901, 902, 904], 903, same=same)
    plans = json.loads(plan_tiny(903, preprocess=False).read_text())
    assert plans["lgssl"]["partial_labels"][f"{B}_lab_00"] == ["liver"]


def test_an_ignore_label_stays_the_last_value(raw_dataset):
    first = raw_dataset(1, 0, 0, 0, labels={"background": 0, "liver": 1, "ignore": 2})
    raw_dataset(1, 0, 0, 0, number=902, labels={"background": 0, "spleen": 1})
    merged = here([901, 902], 903)
    content = description(merged)
    assert content["labels"] == {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
    assert content["annotated"] == {A: ["liver"], B: ["spleen"]}
    old, new = read(first.label_file("lab_00")), read(merged / "labelsTr" / f"{A}_lab_00.nii.gz")
    assert set(np.unique(old)) == {0, 1, 2}
    assert np.array_equal(new, np.where(old == 2, 3, old))


def test_a_stray_value_does_not_become_the_ignore_label_of_another_dataset(raw_dataset, caplog):
    first = raw_dataset(2, 0, 0, 0, labels={"background": 0, "liver": 1})
    raw_dataset(1, 0, 0, 0, number=902, labels={"background": 0, "liver": 1, "ignore": 2})
    stray = sitk.ReadImage(str(first.label_file("lab_01")))
    stray[0, 0, 0] = 2
    sitk.WriteImage(stray, str(first.label_file("lab_01")))
    with (
        caplog.at_level("INFO"),
        pytest.raises(DatasetError, match=r"1 of 3 cases .*\n.*lab_01.* holds the value 2, which"),
    ):
        here([901, 902], 903)
    messages = [record.getMessage() for record in caplog.records]
    assert f"{A}: 2 labelled, 0 unlabelled, 0 test; labels are checked for values that would be ignored" in messages
    assert f"{B}: 1 labelled, 0 unlabelled, 0 test; labels stay" in messages
    stray[0, 0, 0] = 0
    sitk.WriteImage(stray, str(first.label_file("lab_01")))
    merged = here([901, 902], 903)
    for case in ("lab_00", "lab_01"):
        file = merged / "labelsTr" / f"{A}_{case}.nii.gz"
        assert not file.is_symlink()
        assert np.array_equal(read(file), read(first.label_file(case)))
    assert (merged / "labelsTr" / f"{B}_lab_00.nii.gz").is_symlink()


@pytest.mark.parametrize("labels", [{"background": 0, "liver": 1, "ignore": 2}, {"background": 0, "x": 1, "hepar": 2}])
def test_a_cut_off_label_does_not_become_a_sound_one(raw_dataset, labels):
    checked = raw_dataset(1, 0, 0, 0, labels={"background": 0, "liver": 1})
    changed = raw_dataset(1, 0, 0, 0, number=902, labels=labels)
    damaged = (checked if "ignore" in labels else changed).label_file("lab_00")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-20])
    sitk.ReadImage(str(damaged))
    with pytest.raises(DatasetError, match=r"1 of 2 cases (.|\n)*lab_00.nii.gz: cannot be read \(truncated.*\); copy"):
        here([901, 902], 903)
    damaged.write_bytes(whole)
    here([901, 902], 903)


def test_a_label_with_nan_does_not_become_a_sound_one(raw_dataset):
    raw_dataset(1, 0, 0, 0, labels={"background": 0, "liver": 1})
    second = raw_dataset(1, 0, 0, 0, number=902, labels={"background": 0, "spleen": 1})
    label = sitk.Cast(sitk.ReadImage(str(second.label_file("lab_00"))), sitk.sitkFloat32)
    label[0, 0, 0] = float("nan")
    sitk.WriteImage(label, str(second.label_file("lab_00")))
    with pytest.raises(
        DatasetError, match=r"1 of 2 cases (.|\n)*lab_00.* 1 voxels are NaN or infinite; replace them by"
    ):
        here([901, 902], 903)


@pytest.mark.parametrize("fault", ["bit", "cut"])
def test_a_damaged_mha_label_does_not_become_a_sound_one(raw_dataset, fault):
    for number, name in ((901, "liver"), (902, "spleen")):
        writer = raw_dataset(1, 0, 0, 0, number=number, labels={"background": 0, name: 1}, file_ending=".mha")
        for packed in writer.folder.glob("*/*.nii.gz"):
            file = packed.with_name(packed.name.replace(".nii.gz", ".mha"))
            sitk.WriteImage(sitk.ReadImage(str(packed)), str(file), True)
            packed.unlink()
    file = writer.folder / "labelsTr" / "lab_00.mha"
    content = bytearray(file.read_bytes())
    content[-6] ^= 4
    file.write_bytes(content if fault == "bit" else content[:-9])
    with pytest.raises(DatasetError, match=r"1 of 2 cases (.|\n)*lab_00.mha: cannot be read"):
        here([901, 902], 903)


def test_groups_and_partly_annotated_cases_of_a_dataset_come_along(raw_dataset):
    first = raw_dataset(4, 0, 0, 1, labels=FIRST)
    first.content["annotated"] = {"site": ["liver"], "lab_02": ["postcava"]}
    first.content["groups"] = {"site": ["lab_00", "lab_01*"], "other": ["lab_0?"]}
    first.write_json()
    raw_dataset(1, 0, 0, 0, number=902, labels=SECOND)
    content = description(here([901, 902], 903))
    assert content["annotated"] == {
        f"{A}/site": ["liver"],
        f"{A}_lab_02": ["postcava"],
        f"{A}/other_": ["liver", "postcava"],
        B: ["liver", "postcava", "spleen"],
    }
    assert content["groups"] == {
        f"{A}/site": [f"{A}_lab_00", f"{A}_lab_01*"],
        f"{A}/other": [f"{A}_lab_0?"],
        f"{A}/other_": [f"{A}_lab_03", f"{A}_test_00"],
        A: [f"{A}_*"],
        B: [f"{B}_*"],
    }


def test_an_unlabelled_case_of_a_dataset_with_annotated_belongs_to_a_group_for_when_it_gets_a_label(
    raw_dataset, plan_tiny
):
    first = raw_dataset(2, 1, 0, 0, labels=FIRST)
    first.content["annotated"] = {"lab_00": ["liver"], "lab_01": ["postcava"]}
    first.write_json()
    raw_dataset(1, 0, 0, 0, number=902, labels={"background": 0, "spleen": 1})
    merged = here([901, 902], 903)
    assert description(merged)["annotated"][f"{A}/other"] == ["liver", "postcava"]
    assert description(merged)["groups"][f"{A}/other"] == [f"{A}_unl_00"]
    labels = merged / "labelsTr"
    (labels / f"{A}_unl_00.nii.gz").write_bytes((labels / f"{A}_lab_00.nii.gz").read_bytes())
    plans = json.loads(plan_tiny(903, preprocess=False).read_text())
    assert plans["lgssl"]["partial_labels"][f"{A}_unl_00"] == ["liver", "postcava"]


def test_groups_of_a_dataset_that_annotates_all_its_classes_come_along(raw_dataset, plan_tiny):
    first = raw_dataset(2, 0, 0, 1, labels=FIRST)
    first.content["groups"] = {"Süd": ["lab_00", "test_*"], "Nord": ["lab_0[1]"]}
    first.write_json()
    raw_dataset(1, 0, 0, 0, number=902, labels=SECOND)
    content = description(here([901, 902], 903))
    assert content["annotated"] == {A: ["liver", "postcava"], B: ["liver", "postcava", "spleen"]}
    assert content["groups"] == {
        A: [f"{A}_*"],
        f"{A}/Süd": [f"{A}_lab_00", f"{A}_test_*"],
        f"{A}/Nord": [f"{A}_lab_0[1]"],
        B: [f"{B}_*"],
    }
    plan_tiny(903, preprocess=False)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["lab_00"], r"dataset\.json: 'groups' is not an object that gives a list of texts for each name"),
        ({"Nord": "lab_00"}, r"dataset\.json: 'groups' is not an object"),
        ({"Nord": ["lab_7"]}, r"dataset\.json, groups Nord: has no case lab_7; correct the name or remove it"),
    ],
)
def test_groups_that_are_not_as_they_must_be_are_refused_without_annotated_too(two, groups, message):
    two[0].content["groups"] = groups
    two[0].write_json()
    with pytest.raises(DatasetError, match=f"1 problem:\n  {A}/{message}"):
        here([901, 902], 903)


def test_a_case_with_brackets_in_its_name_stands_for_itself_only(raw_dataset, plan_tiny):
    first = raw_dataset(0, 0, 0, 0, labels=FIRST)
    for case in ("a[1]", "a1"):
        first.add(case)
    first.content["annotated"] = {"a[1]": ["liver"]}
    first.write_json()
    raw_dataset(1, 0, 0, 0, number=902, labels=SECOND)
    content = description(here([901, 902], 903))
    assert content["annotated"] == {
        f"{A}_a[1]": ["liver"],
        f"{A}/other": ["liver", "postcava"],
        B: ["liver", "postcava", "spleen"],
    }
    partial = json.loads(plan_tiny(903, preprocess=False).read_text())["lgssl"]["partial_labels"]
    assert partial == {f"{A}_a1": ["liver", "postcava"], f"{A}_a[1]": ["liver"]}


def test_a_dataset_is_a_group_of_all_its_cases_which_are_measured_by_what_each_annotates(raw_dataset, plan_tiny):
    first = raw_dataset(4, 0, 0, 2, labels=FIRST)
    first.content["annotated"] = {"site": ["liver"], "test_00": ["postcava"]}
    first.content["groups"] = {"site": ["lab_00", "lab_01"]}
    first.write_json()
    (first.folder / "labelsTs").mkdir()
    for case in ("test_00", "test_01"):
        (first.folder / "labelsTs" / f"{case}.nii.gz").write_bytes(first.label_file("lab_00").read_bytes())
    raw_dataset(2, 0, 0, 0, number=902, labels=SECOND)
    merged = here([901, 902], 903)
    references = merged / "labelsTs"
    results = evaluate(
        references, references, dataset_json=merged / "dataset.json", group=A, surface_metrics=False, num_processes=0
    )
    measured = {(result.case, result.name) for result in results["cases"] if result.status != NOT_ANNOTATED}
    assert measured == {(f"{A}_test_00", "postcava"), (f"{A}_test_01", "liver"), (f"{A}_test_01", "postcava")}
    partial = json.loads(plan_tiny(903, preprocess=False).read_text())["lgssl"]["partial_labels"]
    whole = ["liver", "postcava"]
    assert partial == {f"{A}_lab_0{n}": classes for n, classes in enumerate([["liver"], ["liver"], whole, whole])}


def test_a_class_of_which_a_case_has_a_part_only_is_not_annotated_there(raw_dataset):
    first = raw_dataset(2, 0, 0, 0, labels={"background": 0, "left kidney": 1, "right kidney": 2, "liver": 3})
    first.content["annotated"] = {"lab_00": ["left kidney", "liver"]}
    first.write_json()
    raw_dataset(1, 0, 0, 0, number=902, labels={"background": 0, "kidney": 1})
    same = [["kidney", "left kidney", "right kidney"]]
    content = description(here([901, 902], 903, same=same))
    assert content["annotated"][f"{A}_lab_00"] == ["liver"]
    assert content["annotated"][f"{A}/other"] == ["kidney", "liver"]
    first.content["annotated"] = {"lab_00": ["left kidney"]}
    first.write_json()
    with pytest.raises(DatasetError, match=f"{A}_lab_00 annotates parts of joined classes only; join other classes"):
        here([901, 902], 905, same=same)


def test_a_merged_dataset_can_be_merged(two, raw_dataset):
    here([901, 902], 903)
    raw_dataset(1, 0, 0, 0, number=904, labels={"background": 0, "spleen": 1})
    content = description(here([903, 904], 905))
    inner = "Dataset903_Merged"
    assert content["annotated"][f"{inner}/{B}"] == ["liver", "postcava", "spleen"]
    assert content["groups"][f"{inner}/{A}"] == [f"{inner}_{A}_*"]
    assert inner not in content["annotated"]
    assert content["groups"][inner] == [f"{inner}_*"]


def test_a_merged_dataset_is_planned_for_the_largest_of_what_it_was_merged_from(raw_dataset, plan_tiny, caplog):
    for number, shape in ((901, (20, 24, 22)), (902, (40, 48, 44)), (904, (20, 24, 22))):
        writer = raw_dataset(0, 0, 0, 0, number=number, labels=FIRST)
        for case in ("a", "b", "c")[: 1 if number == 902 else 3]:
            writer.add(case, shape=shape)
    inner = here([901, 902], 903).name
    content = description(here([903, 904], 905))
    assert content["merged"]["cases"] == {
        f"{inner}_{A}": {"labeled": 3, "unlabeled": 0, "test": 0},
        f"{inner}_{B}": {"labeled": 1, "unlabeled": 0, "test": 0},
        "Dataset904_Tiny": {"labeled": 3, "unlabeled": 0, "test": 0},
    }
    plan_tiny(905, preprocess=False)
    assert f"planned for {inner}_{B}, whose images are the largest" in caplog.text


def test_the_classes_are_listed_before_anything_is_written(two, caplog, data_root):
    with caplog.at_level("INFO"):
        here([901, 902], 903, dry_run=True)
    messages = [record.getMessage() for record in caplog.records]
    shared = f"   1 liver     {A} 'liver' (1), {B} 'hepar' (3)  [one class by the table of synonyms]"
    assert messages[:2] == ["Classes of Dataset903_Merged:", shared]
    assert f"{A}: 2 labelled, 2 unlabelled, 1 test; labels stay" in messages
    assert f"{B}: 2 labelled, 2 unlabelled, 1 test; values of labels change" in messages
    assert not (data_root / "nnUNet_raw" / "Dataset903_Merged").exists()


def test_every_flag_reaches_the_function(monkeypatch, tmp_path, capsys):
    seen = {}
    monkeypatch.setattr(module, "merge_datasets", lambda *a, **options: seen.update(options, places=a) or tmp_path)
    words = (
        "-d 501 Dataset502_X -o 600 --same a=b x=501:y=z --same c=d --keep_apart t 501:u --channel_names A B --copy "
    )
    assert command.main([*words.split(), "--dry_run", "-np", "3", "--no_pbar", "--raw", str(tmp_path)]) == 0
    assert seen == {
        "places": (["501", "Dataset502_X"], "600"),
        "same": [["a", "b"], ["x", "501:y", "z"], ["c", "d"]],
        "keep_apart": ["t", "501:u"],
        "channel_names": ["A", "B"],
        "copy": True,
        "dry_run": True,
        "num_processes": 3,
        "progress": False,
    }
    assert capsys.readouterr().out == f"{tmp_path}\n"


@pytest.mark.parametrize("words", [["--same", "liver"], ["--same", "liver=livr"]])
def test_a_refusal_is_one_message_and_exit_status_two(two, capsys, data_root, words):
    raw = str(data_root / "nnUNet_raw")
    assert command.main(["-d", "901", "902", "-o", "903", "--raw", raw, *words]) == 2
    printed = capsys.readouterr()
    assert "error: " in printed.err
    assert printed.out == ""
    assert not (data_root / "nnUNet_raw" / "Dataset903_Merged").exists()
