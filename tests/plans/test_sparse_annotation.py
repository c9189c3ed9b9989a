"""Two slices per labelled case: which, what is kept of the labels, what is stored, and what is refused."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

from lgssl_nnunet.data.sparse import stored_locations
from lgssl_nnunet.errors import DatasetError, MissingDependencyError, PlansError, UsageError
from lgssl_nnunet.plans import propagation
from lgssl_nnunet.plans import sparse_annotation as module
from lgssl_nnunet.plans.orthogonal_slices import TrueSlice, annotated_volume, class_locations, read_slices
from lgssl_nnunet.plans.sparse_annotation import sparse_annotation, unannotated_cases
from lgssl_nnunet.plans.stored import load_plans
from lgssl_nnunet.training import train

FOLDER = "LGSSLCPUPlans_3d_fullres"


def copying(fixed, moving, label, spacing):
    """A registration that finds nothing to move."""
    return label


@pytest.fixture(autouse=True)
def no_registration(monkeypatch):
    monkeypatch.setitem(propagation.REGISTRATIONS, "simpleitk", copying)


@pytest.fixture
def dataset(tiny_dataset, tmp_path):
    """A planned phantom that may be changed, in nnU-Net's variables."""
    copied = tiny_dataset().copied_to(tmp_path)
    with copied.environment():
        yield copied


@pytest.fixture
def annotate(dataset):
    return partial(sparse_annotation, 901, num_processes=0, progress=False)


def annotation(dataset, case="labeled_000"):
    return blosc2.open(str(dataset.preprocessed / f"{FOLDER}_orthogonal" / f"{case}.b2nd"), mode="r")[:]


def whole_label(dataset, case="labeled_000"):
    stored = blosc2.open(str(dataset.preprocessed / FOLDER / f"{case}_seg.b2nd"), mode="r")[:]
    return np.maximum(stored[0], 0)


def contents(dataset):
    return {f.name: f.read_bytes() for f in (dataset.preprocessed / f"{FOLDER}_orthogonal").iterdir()}


# ------------------------------------------------------------------------------------------------- what is written


def test_the_middle_slices_are_kept_and_the_plans_say_so(dataset, annotate):
    file = annotate()
    assert file.name == "LGSSLCPUPlans_orthogonal.json"
    plans, base = json.loads(file.read_text()), dataset.plans()
    assert plans["plans_name"] == "LGSSLCPUPlans_orthogonal"
    assert list(plans["configurations"]) == ["3d_fullres"]
    assert plans["configurations"]["3d_fullres"] == base["configurations"]["3d_fullres"]
    settings = plans["lgssl"].pop("sparse_annotation")
    assert plans["lgssl"] == base["lgssl"]
    assert settings == {
        "version": 1,
        "planned_as": "LGSSLCPUPlans",
        "registration": "simpleitk",
        "slices": {case: {"z": 10, "y": 12} for case in base["lgssl"]["split"]["labeled"]},
    }
    assert (file.parent / "dataset_fingerprint_LGSSLCPUPlans_orthogonal.json").is_file()


def test_the_true_slices_are_in_both_label_maps_and_count_as_distance_zero(dataset, annotate):
    annotate()
    stored, label = annotation(dataset), whole_label(dataset)
    assert stored.dtype == np.int16
    assert stored.shape == (4, *label.shape)
    for channel in (0, 1):
        assert np.array_equal(stored[channel, 10], label[10])
        assert np.array_equal(stored[channel, :, 12], label[:, 12])
    z, y = np.abs(np.arange(20) - 10), np.abs(np.arange(24) - 12)
    first = np.broadcast_to(1 + z[:, None, None], label.shape).copy()
    first[:, 12] = 1
    second = np.broadcast_to(1 + y[None, :, None], label.shape).copy()
    second[10] = 1
    assert np.array_equal(stored[2], first)
    assert np.array_equal(stored[3], second)


def test_each_direction_propagates_its_own_slice(dataset, annotate):
    annotate()
    stored = annotation(dataset)
    away = np.arange(24) != 12
    assert np.array_equal(stored[0, 3][away], stored[0, 4][away])
    assert np.array_equal(stored[1, np.arange(20) != 10][:, 3], stored[1, np.arange(20) != 10][:, 4])
    assert stored[0, 3].any()
    assert stored[1, :, 3].any()


def test_an_annotators_file_names_other_slices(dataset, annotate, tmp_path):
    cases = dataset.plans()["lgssl"]["split"]["labeled"]
    slices = {case: {"x": 11, "z": 9} for case in cases}
    (tmp_path / "slices.json").write_text(json.dumps({**slices, "another_case": "is not looked at"}))
    plans = json.loads(annotate(slices=tmp_path / "slices.json").read_text())
    assert plans["lgssl"]["sparse_annotation"]["slices"] == slices
    stored, label = annotation(dataset), whole_label(dataset)
    assert np.array_equal(stored[0, :, :, 11], label[:, :, 11])
    assert np.array_equal(stored[1, 9], label[9])
    assert stored[2, 5, 5, 15] == 5  # four slices from x = 11
    assert stored[3, 5, 5, 15] == 5  # four slices from z = 9


def test_places_of_the_classes_are_those_on_the_slices(dataset, annotate):
    annotate()
    label = whole_label(dataset)
    on_slices = np.zeros_like(label)
    on_slices[10], on_slices[:, 12] = label[10], label[:, 12]
    found = stored_locations(dataset.preprocessed / f"{FOLDER}_orthogonal" / "labeled_000.b2nd")
    assert found.keys() == set(np.unique(on_slices)) - {0}
    for value, where in found.items():
        assert np.array_equal(where[:, 1:], np.argwhere(on_slices == value))
        assert not where[:, 0].any()


def test_no_more_places_per_class_are_kept_than_in_preprocessing():
    big = TrueSlice(0, 1, np.ones((120, 120), np.int16))
    found = class_locations([big, TrueSlice(1, 3, np.zeros((3, 120), np.int16))], (3, 120, 120))
    assert found.keys() == {1}
    assert found[1].shape == (10_000, 4)
    assert len(np.unique(found[1], axis=0)) == 10_000


def test_background_outside_the_body_is_marked_where_normalisation_stops_there(dataset, annotate):
    plans = json.loads(annotate().read_text())
    before = annotation(dataset)
    file = dataset.preprocessed / FOLDER / "labeled_000.b2nd"
    image = blosc2.open(str(file), mode="r")[:]
    image[0, :, :, :8] = 0
    blosc2.asarray(image, urlpath=str(file), mode="w")
    for masked in (False, True):
        plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [masked]
        module.annotate_case("labeled_000", dataset.preprocessed, plans, "3d_fullres", ".nii.gz", "origin")
        stored = annotation(dataset)
        expected = before[0].copy()
        if masked:
            expected[:, :, :8][expected[:, :, :8] == 0] = -1
        assert np.array_equal(stored[0], expected)
        assert np.array_equal(stored[1:], before[1:])


# ----------------------------------------------------------------------------------- nothing but the slices is used


def test_other_slices_of_the_label_change_nothing(dataset, annotate):
    """Neither in the raw label nor in the preprocessed one."""
    annotate()
    before = contents(dataset)
    for case in dataset.plans()["lgssl"]["split"]["labeled"]:
        file = dataset.preprocessed / "gt_segmentations" / f"{case}.nii.gz"
        image = sitk.ReadImage(str(file))
        label = sitk.GetArrayFromImage(image)
        poisoned = np.random.default_rng(0).integers(0, 3, label.shape).astype(label.dtype)
        poisoned[10], poisoned[:, 12] = label[10], label[:, 12]
        assert (poisoned != label).any()
        other = sitk.GetImageFromArray(poisoned)
        other.CopyInformation(image)
        sitk.WriteImage(other, str(file))
        stored = dataset.preprocessed / FOLDER / f"{case}_seg.b2nd"
        stored.write_bytes(b"no label".ljust(stored.stat().st_size))
    for file in (dataset.preprocessed / f"{FOLDER}_orthogonal").iterdir():
        file.unlink()
    annotate()
    assert contents(dataset) == before


@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1]])
def test_a_slice_is_transposed_cropped_and_resampled_as_the_whole_label_would_be(transpose, tmp_path):
    """On labels that do not change across the slice, whose resampling then does not depend on the neighbours."""
    rows, columns = np.mgrid[:18, :22]
    shape, axes = (12, 18, 22), "zyx"
    spacing, target = [3.0, 1.0, 1.5], [1.0, 1.5, 1.5]
    blob = ((rows - 8) ** 2 + (columns - 10) ** 2 < 30).astype(np.uint8)
    label = np.broadcast_to(blob, shape).copy()
    image = sitk.GetImageFromArray(label)
    sitk.WriteImage(image, str(tmp_path / "label.nii.gz"))
    box = [[[2, 11], [1, 17], [3, 20]][axis] for axis in transpose]
    properties = {"bbox_used_for_cropping": box, "spacing": spacing}
    resample = partial(resample_data_or_seg_to_shape, is_seg=True, order=1, order_z=0, force_separate_z=None)
    target = [target[axis] for axis in transpose]
    cropped = label.transpose(transpose)[tuple(slice(*bounds) for bounds in box)]
    old_spacing = [spacing[axis] for axis in transpose]
    new_shape = [round(n * old / new) for n, old, new in zip(cropped.shape, old_spacing, target, strict=True)]
    expected = resample(cropped[None], new_shape, old_spacing, target)[0]
    plans = SimpleNamespace(transpose_forward=transpose, image_reader_writer_class=SimpleITKIO)
    configuration = SimpleNamespace(resampling_fn_seg=resample, spacing=target)
    (z,) = read_slices(tmp_path / "label.nii.gz", {"z": 5}, properties, plans, configuration, new_shape)
    assert (z.axis, z.index) == (transpose.index(axes.index("z")), int((5 - 2 + 0.5) * 3))
    assert np.array_equal(z.label, expected.take(z.index, z.axis))
    assert z.label.any()


def test_the_two_maps_share_the_true_slices_whatever_the_order():
    generator = np.random.default_rng(0)
    image = generator.normal(size=(6, 8, 10)).astype(np.float32)
    a = TrueSlice(2, 4, generator.integers(0, 2, (6, 8)).astype(np.int16))
    b = TrueSlice(0, 1, generator.integers(0, 2, (8, 10)).astype(np.int16))
    forth, back = (
        annotated_volume(image, [a, b], (1, 1, 1), copying),
        annotated_volume(image, [b, a], (1, 1, 1), copying),
    )
    assert np.array_equal(forth, back[[1, 0, 3, 2]])


# ------------------------------------------------------------------------------------------------------- resuming


def test_what_is_done_is_kept_and_what_is_missing_or_damaged_is_made_again(dataset, annotate, monkeypatch):
    annotate()
    before, done, original = contents(dataset), [], module.annotate_case
    monkeypatch.setattr(module, "annotate_case", lambda case, *rest: done.append(case) or original(case, *rest))
    annotate()
    assert done == []
    folder = dataset.preprocessed / f"{FOLDER}_orthogonal"
    (folder / "labeled_001.b2nd").unlink()
    (folder / "labeled_002.b2nd").write_bytes(before["labeled_002.b2nd"][:200])
    annotate()
    assert done == ["labeled_001", "labeled_002"]
    assert contents(dataset) == before


def test_other_slices_and_other_images_make_cases_anew(dataset, annotate, tmp_path):
    plans = json.loads(annotate().read_text())
    assert unannotated_cases(dataset.preprocessed, plans, "3d_fullres") == []
    plans["lgssl"]["sparse_annotation"]["slices"]["labeled_003"] = {"y": 12, "z": 10}  # the other order
    assert unannotated_cases(dataset.preprocessed, plans, "3d_fullres") == ["labeled_003"]
    manifest = dataset.preprocessed / f"{FOLDER}.manifest.json"
    content = json.loads(manifest.read_text())
    content["labeled_001"]["images"][0][1] += 1
    manifest.write_text(json.dumps(content))
    assert unannotated_cases(dataset.preprocessed, plans, "3d_fullres") == ["labeled_001", "labeled_003"]
    plans["lgssl"]["sparse_annotation"]["version"] = 0
    assert len(unannotated_cases(dataset.preprocessed, plans, "3d_fullres")) == 6


def test_plans_with_whole_labels_need_no_annotation(dataset):
    assert unannotated_cases(dataset.preprocessed, dataset.plans(), "3d_fullres") == []


def test_an_interrupted_case_leaves_no_file_and_the_others_stay(dataset, annotate, monkeypatch):
    def stop(fixed, moving, label, spacing):
        raise KeyboardInterrupt

    annotate()
    folder = dataset.preprocessed / f"{FOLDER}_orthogonal"
    (folder / "labeled_004.b2nd").unlink()
    monkeypatch.setitem(propagation.REGISTRATIONS, "simpleitk", stop)
    with pytest.raises(KeyboardInterrupt):
        annotate()
    assert sorted(os.listdir(folder)) == [f"labeled_00{n}.b2nd" for n in (0, 1, 2, 3, 5)]


def test_cases_that_fail_are_all_named_and_the_others_are_done(dataset, annotate):
    for case in ("labeled_001", "labeled_004"):
        (dataset.preprocessed / "gt_segmentations" / f"{case}.nii.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match="2 problems") as raised:
        annotate()
    assert "labeled_001: propagation failed" in str(raised.value)
    assert "labeled_004: propagation failed" in str(raised.value)
    assert len(contents(dataset)) == 4
    assert not (dataset.preprocessed / "LGSSLCPUPlans_orthogonal.json").exists()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ("ignore", "sparse in another way already"),
        ("regions", "overlapping regions"),
        ("regions_and_ignore", "sparse"),
    ],
)
def test_labels_that_are_sparse_already_and_regions_are_refused(variant, words, tiny_dataset):
    dataset = tiny_dataset(variant)
    before = sorted(dataset.preprocessed.rglob("*"))
    with dataset.environment(), pytest.raises(PlansError, match=words):
        sparse_annotation(901, num_processes=0, progress=False)
    assert sorted(dataset.preprocessed.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"configurations": ["2d"]}, PlansError, "3D configuration"),
        ({"configurations": ["3d_fullres", "2d"]}, PlansError, "3D configuration"),
        ({"configurations": ["3d_lowres"]}, PlansError, "no configuration 3d_lowres; they have 2d, 3d_fullres"),
        ({"registration": "elastix"}, UsageError, "choose one of simpleitk, ants"),
        ({"plans": "OtherPlans"}, PlansError, "no plans OtherPlans"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_anything_is_written(options, error, words, dataset, annotate):
    before = sorted(dataset.preprocessed.rglob("*"))
    with pytest.raises(error, match=words):
        annotate(**options)
    assert sorted(dataset.preprocessed.rglob("*")) == before


def test_ants_without_its_package_is_refused_with_the_extra_to_install(annotate, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"\.\[ants\]"):
        annotate(registration="ants")


def test_cases_that_are_not_preprocessed_are_refused(dataset, annotate):
    (dataset.preprocessed / FOLDER / "labeled_002.b2nd").unlink()
    with pytest.raises(PlansError, match="labeled_002"):
        annotate()


def test_derived_plans_are_refused(annotate):
    annotate()
    with pytest.raises(PlansError, match="derived from other plans"):
        annotate(plans="LGSSLCPUPlans_orthogonal")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "the file does not name this case; two slices are needed"),
        ({"z": 10}, "two slices are needed"),
        ({"z": 10, "y": 12, "x": 12}, "two slices are needed"),
        ({"z": 10, "depth": 12}, "two slices are needed"),
        ([10, 12], "two slices are needed"),
        ({"z": 20, "y": 12}, "slice 20 along z is not inside the image, whose content spans 0 to 19"),
        ({"z": -1, "y": 12}, "slice -1 along z"),
        ({"z": 10.5, "y": 12}, "slice 10.5 along z"),
        ({"z": True, "y": 12}, "slice True along z"),
    ],
)
def test_every_wrong_entry_of_an_annotators_file_is_named(entry, words, dataset, annotate, tmp_path):
    cases = dataset.plans()["lgssl"]["split"]["labeled"]
    content = {case: {"z": 10, "y": 12} for case in cases} | {"labeled_002": entry, "labeled_005": entry}
    content = {case: slices for case, slices in content.items() if slices is not None}
    (tmp_path / "slices.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="2 problems") as raised:
        annotate(slices=tmp_path / "slices.json")
    assert str(raised.value).count(words) == 2
    assert "case labeled_002" in str(raised.value)


def test_a_file_that_names_no_cases_is_refused(annotate, tmp_path):
    (tmp_path / "slices.json").write_text("[1, 2]")
    with pytest.raises(DatasetError, match="names no cases"):
        annotate(slices=tmp_path / "slices.json")


def test_a_class_that_no_slice_shows_is_warned_of(annotate, dataset, tmp_path, caplog):
    label = whole_label(dataset)
    low = int(np.flatnonzero(~(label == 2).any(axis=(1, 2)))[0])
    left = int(np.flatnonzero(~(label == 2).any(axis=(0, 1)))[0])
    slices = {case: {"z": 10, "y": 12} for case in dataset.plans()["lgssl"]["split"]["labeled"]}
    slices["labeled_000"] = {"z": low, "x": left}
    (tmp_path / "slices.json").write_text(json.dumps(slices))
    with caplog.at_level(logging.WARNING):
        annotate(slices=tmp_path / "slices.json")
    (line,) = [m for m in caplog.messages if m.startswith("gallbladder lies on neither slice")]
    assert "labeled_000" in line
    assert not any(m.startswith("background") for m in caplog.messages)


# ------------------------------------------------------------------------------------------------ other commands


def test_plans_of_two_slices_are_taken_only_by_name(dataset, annotate):
    annotate()
    assert load_plans(dataset.preprocessed, None)["plans_name"] == "LGSSLCPUPlans"
    assert load_plans(dataset.preprocessed, "LGSSLCPUPlans_orthogonal")["lgssl"]["sparse_annotation"]


def test_training_on_annotations_that_are_missing_or_out_of_date_is_refused(dataset, annotate):
    annotate()
    (dataset.preprocessed / f"{FOLDER}_orthogonal" / "labeled_003.b2nd").unlink()
    with pytest.raises(PlansError, match=r"slices of 1 cases .* \(labeled_003\): run lgssl_sparse_annotation again"):
        train(901, "3d_fullres", "DeSCOTrainer", plans="LGSSLCPUPlans_orthogonal", device="cpu")
    assert not list((dataset.root / "nnUNet_results").rglob("*"))


def test_planning_again_leaves_annotations_alone(dataset, annotate, plan_phantom):
    plan_phantom(dataset.root, dataset.name)  # the copy has other paths than its original
    annotate()
    before = contents(dataset)
    plan_phantom(dataset.root, dataset.name)
    assert contents(dataset) == before
    plans = json.loads((dataset.preprocessed / "LGSSLCPUPlans_orthogonal.json").read_text())
    assert unannotated_cases(dataset.preprocessed, plans, "3d_fullres") == []
