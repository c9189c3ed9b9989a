"""Folders of segmentations against references: nnU-Net's summary, our tables, real spacings, and refusals."""

from __future__ import annotations

import csv
import json
import logging
import math
import multiprocessing.pool
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.cli import evaluate as command
from lgssl_nnunet.errors import DatasetError, PlansError, UsageError
from lgssl_nnunet.evaluation import surfaces
from lgssl_nnunet.evaluation.evaluate import evaluate
from lgssl_nnunet.evaluation.metrics import POLICY

needs_surfaces = pytest.mark.skipif(
    surfaces.missing_columns() != (), reason="needs surface-distance and MedPy (extra evaluation)"
)

LABELS = {"background": 0, "liver": 1, "tumour": 2}
REGIONS = {"background": 0, "organ": [1, 2], "tumour": 2, "ignore": 3}


def save(file, array, spacing=None):
    """Write a segmentation; `spacing` is in the order of the array's axes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array, dtype=np.uint8))
    image.SetSpacing([float(step) for step in (spacing or [1] * array.ndim)[::-1]])
    sitk.WriteImage(image, str(file))


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
    assert list(rows[0])[:9] == [
        "case", "key", "name", "dice", "jaccard", "n_reference", "n_prediction", "status", "volume_similarity",
    ]  # fmt: skip
    assert list(rows[3].values())[:9] == ["b", "2", "tumour", "0.0", "0.0", "128", "0", "prediction empty", "0.0"]


def columns(file):
    with file.open(encoding="utf-8") as stream:
        return next(csv.reader(stream))


LESIONS = [
    "lesions_reference", "lesions_prediction", "lesions_found", "lesion_sensitivity", "lesion_false_positives",
]  # fmt: skip


@needs_surfaces
def test_the_table_per_case_has_surfaces_and_the_lesions_of_tumour_classes(folders):
    rows = list(csv.DictReader(here(*folders)["cases_file"].open()))
    assert list(rows[0])[9:] == ["hd95", "assd", "surface_dice", "hd95_medpy", "asd_medpy", *LESIONS]
    assert [rows[0][column] for column in LESIONS] == [""] * 5
    assert [rows[1][column] for column in LESIONS] == ["1", "1", "1", "1.0", "0"]
    assert [rows[3][column] for column in LESIONS] == ["1", "0", "0", "0.0", "0"]
    assert [rows[5][column] for column in LESIONS] == ["0", "0", "0", "nan", "0"]
    diagonal = math.sqrt(3 * 8**2)
    assert [float(rows[3][c]) for c in ("hd95", "assd", "hd95_medpy", "asd_medpy")] == pytest.approx([diagonal] * 4)
    assert rows[3]["surface_dice"] == "0.0"
    assert rows[5]["hd95"] == "nan"


def test_the_means_per_class_are_written_as_json_with_the_policy(folders, tmp_path):
    describe(folders[1], {**LABELS, "spleen": 3})
    results = here(*folders, output=tmp_path / "test.json", tolerance=2.5)
    assert results["classes_file"] == tmp_path / "test_per_class.json"
    text = results["classes_file"].read_text()
    assert "NaN" not in text
    written = json.loads(text)
    assert (written["cases"], written["tolerance_mm"], written["lesion_classes"]) == (3, 2.5, ["tumour"])
    assert written["empty_masks"] == POLICY
    liver, tumour, spleen = written["classes"]
    assert (spleen["dice"], spleen["both_empty"]) == (None, 3)
    assert liver["dice"] == results["classes"][0].dice
    assert "lesions" not in liver
    assert (tumour["lesions"], tumour["lesion_sensitivity"]) == (2, 0.5)
    assert written["mean"] == results["means"]


def test_without_the_extra_surfaces_are_left_out_and_one_sentence_says_so(folders, monkeypatch, caplog):
    monkeypatch.setattr(surfaces, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        results = here(*folders)
    assert columns(results["cases_file"])[9:] == LESIONS
    (message,) = caplog.messages
    assert message == (
        "Left out: hd95, assd, surface_dice, hd95_medpy, asd_medpy. They need pip install -c constraints.txt -e "
        '".[evaluation]" in the checkout.'
    )


def test_surfaces_can_be_left_out(folders, caplog):
    results = here(*folders, surface_metrics=False)
    assert columns(results["cases_file"])[9:] == LESIONS
    assert caplog.messages == []


def test_lesion_classes_can_be_named_or_forbidden(folders):
    liver, tumour = here(*folders, lesion_classes=["liver"], surface_metrics=False)["classes"]
    assert (liver.lesions, liver.lesions_found, tumour.lesions) == (3, 3, None)
    assert columns(here(*folders, lesion_classes=[], surface_metrics=False)["cases_file"])[9:] == []
    with pytest.raises(UsageError, match=r"--lesion_classes cyst: dataset\.json has the classes liver, tumour"):
        here(*folders, lesion_classes=["liver", "cyst"])


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_a_tolerance_that_is_no_length_is_refused(folders, tolerance):
    with pytest.raises(UsageError, match="--tolerance must be a length in mm"):
        here(*folders, tolerance=tolerance)


def distances_of_two_plates(tmp_path, shape, spacing, axis, *, file="a.nii.gz", description=None):
    """hd95 and both MedPy columns of plates that lie three voxels apart along `axis`."""
    masks = []
    for at in (2, 5):
        mask = np.zeros(shape, dtype=np.uint8)
        box = [slice(None) if size == 1 else slice(2, 9) for size in shape]
        box[axis] = slice(at, at + 1)
        mask[tuple(box)] = 1
        masks.append(mask)
    for folder, mask in zip(("reference", "prediction"), masks, strict=True):
        save(tmp_path / folder / file, mask, spacing)
    ending = file[file.index(".") :]
    description = {"labels": {"background": 0, "wall": 1}, "file_ending": ending, **(description or {})}
    (wall,) = here(tmp_path / "reference", tmp_path / "prediction", dataset_json=description)["cases"]
    return wall.hd95, wall.hd95_medpy, wall.asd_medpy


@needs_surfaces
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_has_the_spacing_of_its_file(tmp_path, reader, axis):
    spacing = (5.0, 2.0, 0.5)
    description = {"overwrite_image_reader_writer": reader}
    found = distances_of_two_plates(tmp_path, (12, 12, 12), spacing, axis, description=description)
    assert found == pytest.approx((3 * spacing[axis],) * 3)


@needs_surfaces
@pytest.mark.parametrize("axis", [0, 1])
def test_flat_images_are_measured_in_their_plane(tmp_path, axis):
    spacing = (2.0, 0.5)
    assert distances_of_two_plates(tmp_path, (12, 12), spacing, axis) == pytest.approx((3 * spacing[axis],) * 3)


@needs_surfaces
@pytest.mark.parametrize("single", [0, 1, 2])
def test_images_with_an_axis_of_one_voxel_are_measured_in_their_plane(tmp_path, single):
    shape, spacing = [12, 12], [2.0, 0.5]
    shape.insert(single, 1)
    spacing.insert(single, 7.0)
    axis = (single + 1) % 3
    assert distances_of_two_plates(tmp_path, shape, spacing, axis) == pytest.approx((3 * spacing[axis],) * 3)


@needs_surfaces
def test_pictures_without_a_spacing_are_measured_in_pixels(tmp_path):
    assert distances_of_two_plates(tmp_path, (12, 12), None, 0, file="a.png") == pytest.approx((3, 3, 3))


@needs_surfaces
def test_a_missed_class_of_a_flat_image_costs_the_diagonal_of_its_plane(tmp_path):
    mask = np.zeros((30, 80), dtype=np.uint8)
    mask[3:6, 3:6] = 1
    save(tmp_path / "reference" / "a.nii.gz", mask, (1, 0.5))
    save(tmp_path / "prediction" / "a.nii.gz", 0 * mask, (1, 0.5))
    description = {"labels": {"background": 0, "wall": 1}, "file_ending": ".nii.gz"}
    (wall,) = here(tmp_path / "reference", tmp_path / "prediction", dataset_json=description)["cases"]
    assert (wall.hd95, wall.asd_medpy) == pytest.approx((50, 50))


@needs_surfaces
def test_the_reference_gives_the_spacing_and_another_in_the_prediction_is_told(folders, caplog):
    reference, prediction = folders
    save(reference / "a.nii.gz", cube(l1=np.s_[2:3]), (4, 1, 1))
    save(prediction / "a.nii.gz", cube(l1=np.s_[5:6]), (1, 1, 1))
    assert here(reference, prediction)["cases"][0].hd95_medpy == pytest.approx(12)
    assert "differ in 1 case(s): a.nii.gz" in caplog.text


@needs_surfaces
@pytest.mark.parametrize(("tolerance", "surface_dice"), [(0, 0), (2, 0.5), (3, 1)])
def test_the_tolerance_reaches_the_surface_dice(folders, tolerance, surface_dice):
    reference, prediction = folders
    save(reference / "a.nii.gz", cube(l1=np.s_[1:2, 2:6, 2:6]))
    save(prediction / "a.nii.gz", cube(l1=np.s_[4:5, 2:6, 2:6]))
    assert here(reference, prediction, tolerance=tolerance)["cases"][0].surface_dice == pytest.approx(surface_dice)


@needs_surfaces
def test_ignored_voxels_are_in_no_mask_no_surface_and_no_lesion(folders, caplog):
    reference, prediction = folders
    describe(prediction, {"background": 0, "liver": 1, "tumour": 2, "ignore": 3})
    for name in "abc":
        save(reference / f"{name}.nii.gz", cube(l2=np.s_[1:3], l3=np.s_[4:8]))
        save(prediction / f"{name}.nii.gz", cube(l1=np.s_[7:8], l2=np.s_[[1, 2, 5]]))
    with caplog.at_level(logging.INFO):
        liver, tumour = here(reference, prediction)["cases"][:2]
    assert liver.status == "both empty"
    assert (tumour.dice, tumour.hd95, tumour.surface_dice, tumour.lesion_false_positives) == (1, 0, 1, 0)
    assert "3 reference(s) hold ignored voxels" in caplog.text


@needs_surfaces
def test_regions_have_surfaces_and_lesions_of_their_own(folders):
    reference, prediction = folders
    describe(prediction, REGIONS, order=[1, 2])
    for name in "abc":
        save(reference / f"{name}.nii.gz", cube(l1=np.s_[0:3], l2=np.s_[3:4]))
        save(prediction / f"{name}.nii.gz", cube(l1=np.s_[0:2], l2=np.s_[2:4]))
    organ, tumour = here(reference, prediction)["cases"][:2]
    assert (organ.hd95_medpy, organ.surface_dice, organ.lesions_reference) == (0, 1, None)
    assert (tumour.hd95_medpy, tumour.lesions_found) == (1, 1)


def test_each_file_is_read_once(folders, monkeypatch):
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    read, original = [], SimpleITKIO.read_seg
    monkeypatch.setattr(SimpleITKIO, "read_seg", lambda self, file: read.append(file) or original(self, file))
    here(*folders)
    assert sorted(read) == sorted(str(folder / f"{name}.nii.gz") for folder in folders for name in "abc")


def test_what_goes_to_workers_and_comes_back_can_be_sent(folders, monkeypatch):
    import lgssl_nnunet.evaluation.evaluate as module

    def by_post(function, tasks, **options):
        for name, task in pickle.loads(pickle.dumps(tasks)).items():
            yield name, pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(function))(*task)))

    expected = here(*folders)["cases_file"].read_text()
    monkeypatch.setattr(module, "run_cases", by_post)
    assert here(*folders)["cases_file"].read_text() == expected


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
    assert (
        f"{prediction / 'a.nii.gz'} has 8 x 8 x 7 voxels and {reference / 'a.nii.gz'} has 8 x 8 x 8; check" in message
    )
    assert "b.nii.gz holds labels that dataset.json does not know (7); correct the file, or name" in message
    assert f"{prediction / 'c.nii.gz'} cannot be read (" in message
    assert "); write it again or remove it" in message
    assert ".cxx" not in message


@pytest.mark.parametrize("side", [0, 1], ids=["reference", "prediction"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("lost", [9, 0.5], ids=["the last bytes", "half"])
def test_a_file_that_is_cut_off_is_no_segmentation(tmp_path, capsys, side, ending, lost):
    """ITK reads such a file without a word and fills what is missing with background."""
    folders = [tmp_path / "labelsTs", tmp_path / "out"]
    noise = np.random.default_rng(0).integers(0, 2, (20, 20, 20))
    for folder in folders:
        save(folder / f"a{ending}", noise)
    (folders[1] / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1}, "file_ending": ending}))
    file = folders[side] / f"a{ending}"
    content = file.read_bytes()
    file.write_bytes(content[: -lost if lost > 1 else int(lost * len(content))])
    assert command.main([*map(str, folders), "-np", "0", "--no_surface_metrics"]) == 2
    error = capsys.readouterr().err
    assert f"{file} cannot be read (truncated" in error
    assert not (folders[1] / "summary.json").exists()


def test_a_changed_byte_in_a_compressed_file_is_not_scored(tmp_path, capsys):
    folders = [tmp_path / "labelsTs", tmp_path / "out"]
    for folder in folders:
        save(folder / "a.nii.gz", np.random.default_rng(0).integers(0, 2, (20, 20, 20)))
    description = {"labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (folders[1] / "dataset.json").write_text(json.dumps(description))
    file = folders[1] / "a.nii.gz"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1  # in the checksum, so everything can be unpacked
    file.write_bytes(content)
    assert command.main([*map(str, folders), "-np", "0", "--no_surface_metrics"]) == 2
    assert f"{file} cannot be read (CRC check failed" in capsys.readouterr().err


def test_missing_folders_descriptions_and_matches_are_refused(folders, tmp_path):
    reference, prediction = folders
    with pytest.raises(DatasetError, match="nowhere does not exist; give the folder of the references"):
        here(tmp_path / "nowhere", prediction)
    with pytest.raises(DatasetError, match="nowhere does not exist; give the folder of the predictions"):
        here(reference, tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"out/a\.nii\.gz is a file; give the folder of the predictions"):
        here(reference, prediction / "a.nii.gz")
    with pytest.raises(DatasetError, match=r"nothing to compare.* holds 0 file\(s\) that end in \.nrrd.*-djfile"):
        here(reference, prediction, dataset_json={"labels": LABELS, "file_ending": ".nrrd"})
    with pytest.raises(DatasetError, match=r"ends in \.json"):
        here(reference, prediction, output=tmp_path / "x.csv")
    (prediction / "dataset.json").unlink()
    with pytest.raises(PlansError, match=r"dataset\.json is missing; name it with -djfile"):
        here(reference, prediction)


def test_names_that_never_match_are_shown_from_both_folders(folders):
    reference, prediction = folders
    for name in "abc":
        (prediction / f"{name}.nii.gz").rename(prediction / f"{name}_0000.nii.gz")
    with pytest.raises(DatasetError, match="give each prediction the name of its reference") as refusal:
        here(reference, prediction)
    assert f"{reference} holds 3 file(s) that end in .nii.gz, such as a.nii.gz" in str(refusal.value)
    assert f"{prediction} holds 3 file(s) that end in .nii.gz, such as a_0000.nii.gz" in str(refusal.value)


def test_without_plans_the_labels_are_read_as_nnunet_does(folders):
    reference, prediction = folders
    (prediction / "plans.json").unlink()
    assert [mean.name for mean in here(reference, prediction)["classes"]] == ["liver", "tumour"]


def test_every_flag_of_the_command_reaches_the_function(monkeypatch, capsys):
    import lgssl_nnunet.evaluation.evaluate as module

    seen = {}
    results = {
        "classes": [], "tolerance": 2.0, "summary_file": "S.json", "cases_file": "S.csv", "classes_file": "C.json",
    }  # fmt: skip
    monkeypatch.setattr(
        module, "evaluate", lambda *folders, **options: seen.update(options, folders=folders) or results
    )
    words = "-djfile D -pfile P -o S.json -np 3 --chill --tolerance 2 --lesion_classes liver cyst --no_surface_metrics"
    assert command.main(["REFERENCE", "PREDICTION", *words.split(), "--group", "A"]) == 0
    assert seen == {
        "folders": ("REFERENCE", "PREDICTION"),
        "dataset_json": "D",
        "plans": "P",
        "output": "S.json",
        "tolerance": 2.0,
        "lesion_classes": ["liver", "cyst"],
        "group": "A",
        "surface_metrics": False,
        "num_processes": 3,
        "chill": True,
    }
    assert capsys.readouterr().out.endswith("Written: S.json, S.csv, C.json\n")


def test_the_command_prints_the_table_and_where_the_files_are(folders, capsys):
    assert command.main([*map(str, folders), "-np", "0"]) == 0
    output = capsys.readouterr().out
    liver = output.splitlines()[2].split()
    assert (liver[:4], liver[-3:]) == (["liver", "1", "0.7222", "0.6111"], ["3", "0", "0"])
    assert POLICY in output
    assert "summary_per_case.csv" in output
    assert "summary_per_class.json" in output


def test_the_command_hands_its_results_to_the_report(folders, tmp_path, monkeypatch, capsys):
    from lgssl_nnunet.evaluation.report import report as module

    seen = {}
    monkeypatch.setattr(
        module, "report", lambda source, **options: seen.update(options, source=source) or options["output"]
    )
    reference, prediction = map(str, folders)
    summary = tmp_path / "new" / "s.json"
    assert command.main([reference, prediction, "-np", "0", "-o", str(summary), "--report"]) == 0
    assert (seen["source"], seen["reference"], seen["num_processes"]) == (prediction, reference, 0)
    assert seen["results"]["summary_file"] == summary
    assert seen["output"] == tmp_path / "new" / "lgssl_report.html"
    assert str(seen["output"]) in capsys.readouterr().out


def test_the_command_refuses_in_one_message(folders, capsys):
    (folders[1] / "a.nii.gz").unlink()
    assert command.main([*map(str, folders), "-np", "0"]) == 2
    error = capsys.readouterr().err
    assert "lacks 1 of 3 cases" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "holds no JSON object"),
        ({"labels": LABELS, "file_ending": 5}, "needs the entries labels and file_ending"),
        ({"labels": ["liver"], "file_ending": ".nii.gz"}, "needs the entries labels and file_ending"),
        ({"labels": {"liver": 1}, "file_ending": ".nii.gz"}, "can make nothing of the labels .*Background"),
        ({"labels": {**LABELS, "liver": None}, "file_ending": ".nii.gz"}, "can make nothing of the labels .*TypeError"),
        ({"labels": REGIONS, "file_ending": ".nii.gz"}, "can make nothing of the labels .*regions_class_order"),
    ],
)
def test_a_description_of_another_form_is_refused(content, words, folders):
    (folders[1] / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(PlansError, match=words):
        evaluate(*folders, num_processes=0)


def test_a_segmentation_without_a_spacing_is_refused(folders, monkeypatch):
    monkeypatch.setattr(
        "nnunetv2.imageio.simpleitk_reader_writer.SimpleITKIO.read_seg",
        lambda self, file: (np.zeros((1, 8, 8, 8)), {"spacing": [1.0, math.nan, 1.0]}),
    )
    with pytest.raises(DatasetError, match=r"a\.nii\.gz has spacing \[1\.0, nan, 1\.0\] mm; correct its header"):
        evaluate(*folders, num_processes=0)
