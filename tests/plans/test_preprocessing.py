from __future__ import annotations

import json
import pickle

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.plans import preprocessing


@pytest.fixture
def preprocessed(data_root):
    return data_root / "nnUNet_preprocessed" / "Dataset901_Tiny"


@pytest.fixture
def redone(monkeypatch):
    """The cases that were preprocessed, in order."""
    names = []
    original = preprocessing.preprocess_case
    monkeypatch.setattr(
        preprocessing, "preprocess_case", lambda case, *rest: names.append(case.identifier) or original(case, *rest)
    )
    return names


def names_in(folder) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_labelled_and_unlabelled_cases_land_in_their_folders(raw_dataset, plan_tiny, preprocessed):
    raw_dataset(labeled=2, unlabeled=1, in_images_un=1)
    plan_tiny()
    labeled, unlabeled = (preprocessed / f"LGSSLCPUPlans_3d_fullres{suffix}" for suffix in ("", "_unlabeled"))
    assert names_in(labeled) == {
        f"lab_{case}{ending}" for case in ("00", "01") for ending in (".b2nd", "_seg.b2nd", ".pkl")
    }
    assert names_in(unlabeled) == {f"{case}{ending}" for case in ("unl_00", "more_00") for ending in (".b2nd", ".pkl")}
    assert names_in(preprocessed / "gt_segmentations") == {"lab_00.nii.gz", "lab_01.nii.gz"}
    properties = pickle.loads((unlabeled / "unl_00.pkl").read_bytes())
    assert "class_locations" not in properties
    assert {"spacing", "shape_before_cropping", "bbox_used_for_cropping"} <= set(properties)
    assert set(pickle.loads((labeled / "lab_00.pkl").read_bytes())["class_locations"]) == {1, 2}


def test_an_unlabelled_image_is_preprocessed_like_a_labelled_one(raw_dataset, plan_tiny, preprocessed):
    raw_dataset(labeled=2, unlabeled=0, in_images_un=0, channels=2)
    plan_tiny(overwrite_plans_name="Both")
    settings = json.loads((preprocessed / "Both.json").read_text())["foreground_intensity_properties_per_channel"]
    plan_tiny(overwrite_plans_name="One", labeled=1)
    one = json.loads((preprocessed / "One.json").read_text())
    assert one["foreground_intensity_properties_per_channel"] != settings  # channel 0 is CT: normalised with these
    (case,) = one["lgssl"]["split"]["unlabeled"]
    labeled = blosc2.open(str(preprocessed / "Both_3d_fullres" / f"{case}.b2nd"))
    unlabeled = blosc2.open(str(preprocessed / "One_3d_fullres_unlabeled" / f"{case}.b2nd"))
    assert labeled.shape == unlabeled.shape
    assert (labeled.dtype, labeled.chunks, labeled.blocks) == (unlabeled.dtype, unlabeled.chunks, unlabeled.blocks)
    np.testing.assert_array_equal(labeled[1], unlabeled[1])  # channel 1 is MRI: normalised by itself


def test_only_new_and_changed_cases_are_preprocessed_again(raw_dataset, plan_tiny, preprocessed, redone):
    writer = raw_dataset(labeled=2, unlabeled=1, in_images_un=0, channel_names={"0": "MRI"})
    plan_tiny()
    plan_tiny()
    assert redone == ["lab_00", "lab_01", "unl_00"]
    redone.clear()
    writer.add("zz_new", labeled=False)
    writer.image_file("unl_00").touch()
    (preprocessed / "LGSSLCPUPlans_3d_fullres" / "lab_01.pkl").unlink()
    plan_tiny()
    assert redone == ["lab_01", "unl_00", "zz_new"]


def test_cases_that_changed_sides_or_vanished_leave_no_files(raw_dataset, plan_tiny, preprocessed):
    writer = raw_dataset(labeled=3, unlabeled=1, in_images_un=0)
    plan_tiny(overwrite_plans_name="P")
    writer.label_file("lab_02").unlink()
    writer.image_file("unl_00").unlink()
    plan_tiny(overwrite_plans_name="P")
    assert {name[:6] for name in names_in(preprocessed / "P_3d_fullres")} == {"lab_00", "lab_01"}
    assert names_in(preprocessed / "P_3d_fullres_unlabeled") == {"lab_02.b2nd", "lab_02.pkl"}
    assert sorted(json.loads((preprocessed / "P_3d_fullres.manifest.json").read_text())) == [
        "lab_00",
        "lab_01",
        "lab_02",
    ]


def test_clean_preprocesses_everything_again(raw_dataset, plan_tiny, redone):
    raw_dataset(labeled=1, unlabeled=0)
    plan_tiny()
    plan_tiny(clean=True)
    assert redone == ["lab_00", "more_00"] * 2


def test_failing_cases_are_named_together_and_the_others_are_kept(
    raw_dataset, plan_tiny, preprocessed, redone, monkeypatch
):
    raw_dataset(labeled=3, unlabeled=1, in_images_un=0)
    working = preprocessing.preprocess_case

    def sometimes_failing(case, *rest):
        if case.identifier in ("lab_01", "unl_00"):
            raise MemoryError("too large")
        return working(case, *rest)

    monkeypatch.setattr(preprocessing, "preprocess_case", sometimes_failing)
    with pytest.raises(DatasetError, match=r"lab_01: preprocessing failed \(MemoryError: too large\)(.|\n)*unl_00"):
        plan_tiny()
    assert not (preprocessed / "LGSSLCPUPlans_3d_fullres.unfinished").exists()
    monkeypatch.setattr(preprocessing, "preprocess_case", working)
    redone.clear()
    plan_tiny()
    assert redone == ["lab_01", "unl_00"]


def test_an_interrupted_run_continues_where_it_stopped(raw_dataset, plan_tiny, redone, monkeypatch):
    raw_dataset(labeled=3, unlabeled=0, in_images_un=0)
    working = preprocessing.preprocess_case

    def interrupted(case, *rest):
        if case.identifier == "lab_01":
            raise KeyboardInterrupt
        return working(case, *rest)

    monkeypatch.setattr(preprocessing, "preprocess_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan_tiny()
    monkeypatch.setattr(preprocessing, "preprocess_case", working)
    redone.clear()
    plan_tiny()
    assert redone == ["lab_01", "lab_02"]


def test_a_changed_label_is_copied_again_and_others_are_left_alone(raw_dataset, plan_tiny, preprocessed):
    writer = raw_dataset(labeled=2)
    plan_tiny()
    copies = preprocessed / "gt_segmentations"
    before = (copies / "lab_01.nii.gz").stat().st_ino
    writer.label_file("lab_00").write_bytes(writer.label_file("lab_01").read_bytes())
    plan_tiny(labeled=1, configurations=("2d",))
    plan_tiny(configurations=("2d",))
    assert (copies / "lab_00.nii.gz").read_bytes() == writer.label_file("lab_00").read_bytes()
    assert (copies / "lab_01.nii.gz").stat().st_ino == before


# ------------------------------------------------------------------------------------------------ outside of the body


@pytest.fixture
def stripped(raw_dataset):
    """Images with zeros around the body, three on another grid: with a label, with a part of one, with none."""
    writer = raw_dataset(labeled=4, unlabeled=0, in_images_un=0, test=0, channel_names={"0": "MRI"})
    for name in ("lab_other", "part_other", "unl_other"):
        writer.add(name, labeled=name != "unl_other", spacing=(1.4, 1.3, 1.2))
    writer.content["annotated"] = {"part_other": ["liver"]}
    writer.write_json()
    for file in (writer.folder / "imagesTr").iterdir():
        volume = sitk.ReadImage(str(file))
        image = sitk.GetArrayFromImage(volume)
        z, y, x = np.indices(image.shape)
        body = ((z - 10) / 7) ** 2 + ((y - 11) / 8) ** 2 + ((x - 10) / 7) ** 2 < 1
        changed = sitk.GetImageFromArray(image * body)
        changed.CopyInformation(volume)
        sitk.WriteImage(changed, str(file))
    return writer


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "nnunet"])
def test_images_unlabelled_or_in_part_are_zero_outside_of_the_body_and_labelled_ones_as_nnunet_makes_them(
    stock, stripped, plan_tiny, preprocessed, monkeypatch
):
    if stock:
        monkeypatch.setattr(preprocessing, "recipe_of", lambda *planned: None)
    manager = PlansManager(plans := json.loads(plan_tiny().read_text()))
    configuration = manager.get_configuration("3d_fullres")
    assert configuration.use_mask_for_norm == [True]
    preprocessor = configuration.preprocessor_class(verbose=False)
    for name, suffix in (("lab_other", ""), ("part_other", ""), ("unl_other", "_unlabeled")):
        files, label_file = [str(stripped.image_file(name))], None if suffix else str(stripped.label_file(name))
        image, label, _ = preprocessor.run_case(files, label_file, manager, configuration, stripped.content)
        stored = blosc2.open(str(preprocessed / f"{plans['plans_name']}_3d_fullres{suffix}" / f"{name}.b2nd"))[:]
        cleared = np.where(label == -1, 0, image)
        assert np.abs(cleared - image).max() > 0.01
        expected = image if name == "lab_other" else cleared
        assert (np.abs(stored - expected) <= 1e-5 * np.ptp(image)).mean() > 0.999  # ties of the mask may differ


def test_cases_made_before_they_were_cleared_are_made_again_and_no_others(stripped, plan_tiny, preprocessed, redone):
    plans = json.loads(plan_tiny().read_text())
    redone.clear()
    manifest = preprocessed / "LGSSLCPUPlans_3d_fullres.manifest.json"
    entries = json.loads(manifest.read_text())
    cleared = ["part_other", "unl_other"]
    assert [name for name, entry in entries.items() if entry.pop("cleared_outside", False)] == cleared
    manifest.write_text(json.dumps(entries))
    assert preprocessing.unprepared_cases(preprocessed, plans, "3d_fullres", stripped.content) == cleared
    plan_tiny()
    assert redone == cleared
    assert preprocessing.unprepared_cases(preprocessed, plans, "3d_fullres", stripped.content) == []


def test_where_nothing_is_masked_the_manifest_is_as_it_was(raw_dataset, plan_tiny, preprocessed):
    raw_dataset(labeled=1, unlabeled=1, in_images_un=0, test=0)
    plan_tiny()
    entries = json.loads((preprocessed / "LGSSLCPUPlans_3d_fullres.manifest.json").read_text())
    assert all(entry.keys() == {"labeled", "images", "label", "settings", "files"} for entry in entries.values())
