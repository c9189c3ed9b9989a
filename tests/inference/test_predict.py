"""The function behind lgssl_predict: inputs, outputs, the record beside them, and refusals before any work."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.errors import CheckpointError, DatasetError, UsageError
from lgssl_nnunet.inference import predict as module
from lgssl_nnunet.inference.predict import RECORD, PredictionError

NNUNET_FILES = {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}


@pytest.fixture
def no_network(monkeypatch):
    """Fail if a refusal comes only after the network was loaded."""

    def loaded(*arguments, **options):
        raise AssertionError("the model was loaded before the input was checked")

    monkeypatch.setattr(module, "LGSSLPredictor", loaded)


def test_a_folder_is_segmented_in_the_geometry_of_its_images(trained, images, tmp_path, predict_here):
    written = predict_here(images, tmp_path / "out")
    assert written == [tmp_path / "out" / "a.nii.gz", tmp_path / "out" / "b.nii.gz"]
    for name in "ab":
        image, segmentation = (
            sitk.ReadImage(str(file)) for file in (images / f"{name}_0000.nii.gz", tmp_path / "out" / f"{name}.nii.gz")
        )
        assert segmentation.GetSize() == image.GetSize()
        assert segmentation.GetSpacing() == pytest.approx(image.GetSpacing())
        assert segmentation.GetOrigin() == pytest.approx(image.GetOrigin())
        assert segmentation.GetDirection() == pytest.approx(image.GetDirection())
        assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= {0, 1, 2}


def test_the_output_folder_says_what_made_it(trained, images, tmp_path, predict_here, caplog):
    with caplog.at_level("INFO"):
        predict_here(images, tmp_path / "out", disable_tta=True, precision="fp32")
    assert "Model: Dataset501_Tiny nnUNetTrainer LGSSLCPUPlans 3d_fullres, fold 0" in caplog.text
    shown = {file.name for file in (tmp_path / "out").iterdir() if not file.name.startswith(".")}
    assert shown == {"a.nii.gz", "b.nii.gz", RECORD, *NNUNET_FILES}
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["model"]["trainer"] == "nnUNetTrainer"
    assert record["model"]["folds"] == ["0"]
    assert record["settings"] == {"precision": "fp32", "step_size": 0.5, "mirroring_axes": []}
    assert {"lgssl_nnunet", "nnunetv2", "torch"} <= set(record["versions"])


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan_0000.nii.gz"])
def test_one_file_is_segmented_whatever_its_name(trained, image_maker, tmp_path, predict_here, name):
    file = image_maker(tmp_path / "in" / name)
    assert predict_here(file, tmp_path / "out") == [tmp_path / "out" / "scan.nii.gz"]
    assert (tmp_path / "out" / "scan.nii.gz").is_file()


def test_lists_of_channel_files_are_segmented_in_the_order_given(model_maker, image_maker, tmp_path, predict_here):
    model_maker(channels=2)
    first, second = image_maker(tmp_path / "t1.nii.gz", seed=1), image_maker(tmp_path / "t2.nii.gz", seed=2)
    image_maker(tmp_path / "in" / "x_0000.nii.gz", seed=1)
    image_maker(tmp_path / "in" / "x_0001.nii.gz", seed=2)
    (by_folder,) = predict_here(tmp_path / "in", tmp_path / "folder")
    (by_list,) = predict_here([[first, second]], tmp_path / "list")
    assert by_list.name == "t1.nii.gz"
    assert np.array_equal(*[sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in (by_folder, by_list)])


def test_two_dimensional_models_predict_volumes_slice_by_slice(model_maker, images, tmp_path, predict_here):
    model_maker(configuration="2d", mirroring_axes=(0, 1))
    for precision in ("stock", "fp32"):
        assert predict_here(images / "a_0000.nii.gz", tmp_path / precision, precision=precision)[0].is_file()


def test_parts_share_the_cases_between_them(trained, images, image_maker, tmp_path, predict_here):
    image_maker(images / "c_0000.nii.gz", seed=3)
    first = predict_here(images, tmp_path / "out", num_parts=2, part_id=0, disable_tta=True)
    second = predict_here(images, tmp_path / "out", num_parts=2, part_id=1, disable_tta=True)
    assert [file.name for file in (*first, *second)] == ["a.nii.gz", "c.nii.gz", "b.nii.gz"]
    with pytest.raises(UsageError, match="-part_id 2 must be from 0 to 1"):
        predict_here(images, tmp_path / "out", num_parts=2, part_id=2)


def test_existing_predictions_are_kept_unless_asked_otherwise(trained, images, tmp_path, predict_here):
    out = tmp_path / "out"
    predict_here(images, out, disable_tta=True)
    corrected = sitk.ReadImage(str(out / "a.nii.gz")) * 0
    sitk.WriteImage(corrected, str(out / "a.nii.gz"))
    by_hand = (out / "a.nii.gz").read_bytes()
    (out / "b.nii.gz").unlink()
    with pytest.raises(UsageError, match=r"already holds a.nii.gz: add --continue_prediction .*--overwrite"):
        predict_here(images, out, disable_tta=True)
    predict_here(images, out, disable_tta=True, continue_prediction=True)
    assert (out / "a.nii.gz").read_bytes() == by_hand
    assert (out / "b.nii.gz").is_file()
    predict_here(images, out, disable_tta=True, overwrite=True)
    assert (out / "a.nii.gz").read_bytes() != by_hand
    with pytest.raises(UsageError, match="give one"):
        predict_here(images, out, continue_prediction=True, overwrite=True)


def test_continuing_with_probabilities_predicts_cases_that_lack_them(trained, images, tmp_path, predict_here):
    out = tmp_path / "out"
    predict_here(images / "a_0000.nii.gz", out, disable_tta=True)
    predict_here(images, out, disable_tta=True, continue_prediction=True, save_probabilities=True)
    assert {f"{name}.{kind}" for name in "ab" for kind in ("npz", "pkl")} <= {file.name for file in out.iterdir()}


def test_results_of_another_model_or_setting_are_not_mixed_in(trained, images, tmp_path, predict_here):
    out = tmp_path / "out"
    predict_here(images / "a_0000.nii.gz", out, disable_tta=True)
    with pytest.raises(
        UsageError, match=r"model or setting \(mirroring_axes: none there, 0, 1, 2 asked\); choose another"
    ):
        predict_here(images / "b_0000.nii.gz", out, continue_prediction=True)


def test_a_dataset_folder_as_output_is_refused(trained, images, tmp_path, predict_here):
    out = tmp_path / "Dataset501_Tiny"
    out.mkdir()
    (out / "dataset.json").write_text('{"labels": {"background": 0, "something": 1}}')
    with pytest.raises(UsageError, match=r"dataset\.json comes from another dataset"):
        predict_here(images, out)
    assert "something" in (out / "dataset.json").read_text()


def test_the_folder_of_the_images_as_output_is_refused(trained, images, predict_here, no_network):
    with pytest.raises(UsageError, match="is the folder of the images"):
        predict_here(images, images)
    with pytest.raises(UsageError, match="is a file; give the folder"):
        predict_here(images, images.parent / "segmentation.nii.gz")


def test_missing_and_surplus_channels_and_wrong_names_are_told_together(
    model_maker, image_maker, tmp_path, predict_here, no_network
):
    model_maker(channels=2)
    folder = tmp_path / "in"
    for name in ("good_0000", "good_0001", "half_0001", "many_0000", "many_0001", "many_0002", "nameless"):
        image_maker(folder / f"{name}.nii.gz")
    shutil.copy(folder / "nameless.nii.gz", folder / "other.nii")
    (folder / "readme.txt").write_text("ignored")
    with pytest.raises(DatasetError) as error:
        predict_here(folder, tmp_path / "out")
    message = str(error.value)
    assert "half: channel _0000.nii.gz (T1) is missing" in message
    assert "many: the model has 2 channel(s), so _0002.nii.gz" in message
    assert "nameless.nii.gz: the name has no channel number; rename it, for example to nameless_0000.nii.gz" in message
    assert "other.nii: the model reads .nii.gz files only" in message
    assert "good" not in message
    assert "readme" not in message
    assert not (tmp_path / "out").exists()


def test_one_file_for_a_model_with_two_channels_names_the_missing_one(
    model_maker, image_maker, tmp_path, predict_here, no_network
):
    model_maker(channels=2)
    with pytest.raises(DatasetError, match=r"the model also needs _0001.nii.gz \(T2\); give the folder"):
        predict_here(image_maker(tmp_path / "x_0000.nii.gz"), tmp_path / "out")
    with pytest.raises(DatasetError, match=r"1 file\(s\) given, and the model needs the channels T1, T2"):
        predict_here([[tmp_path / "x_0000.nii.gz"]], tmp_path / "out")


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (20, 16, 15)}, "has shape [20, 16, 15] and x_0000.nii.gz has [20, 16, 14]"),
        ({"spacing": (1.0, 1.25, 3.0)}, "has spacing [1.0, 1.25, 3.0] mm and x_0000.nii.gz has [1.0, 1.25, 1.5] mm"),
        ({"origin": (0.0, 0.0, 0.0)}, "has origin ["),
        ({"direction": (1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0)}, "has direction ["),
    ],
)
def test_channels_on_different_grids_are_refused(
    change, message, reader, model_maker, image_maker, tmp_path, predict_here, no_network
):
    plans = model_maker(channels=2) / "plans.json"
    plans.write_text(plans.read_text().replace("SimpleITKIO", reader))
    image_maker(tmp_path / "in" / "x_0000.nii.gz")
    other = image_maker(tmp_path / "in" / "x_0001.nii.gz", size=change.get("size", (20, 16, 14)))
    image = sitk.ReadImage(str(other))
    for what, value in change.items():
        if what != "size":
            getattr(image, f"Set{what.capitalize()}")(value)
    sitk.WriteImage(image, str(other))
    with pytest.raises(DatasetError, match=re.escape(f"  x_0001.nii.gz: {message}")) as error:
        predict_here(tmp_path / "in", tmp_path / "out")
    assert "; re-export or resample the channels together" in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("x_0001", "x_0000"), r"x_0001\.nii\.gz: it is listed as _0000\.nii\.gz \(T1\) and its name tells another"),
        (("x_0000", "x_0000"), r"x_0000\.nii\.gz: its case lists one file twice"),
        (("x_0000", "y_0001"), r"y_0001\.nii\.gz: its name tells another case than x_0000\.nii\.gz"),
    ],
)
def test_names_that_contradict_a_list_of_channels_are_refused(
    names, message, model_maker, image_maker, tmp_path, predict_here, no_network
):
    model_maker(channels=2)
    files = [image_maker(tmp_path / f"{name}.nii.gz") for name in names]
    with pytest.raises(DatasetError, match=message):
        predict_here([files], tmp_path / "out")


@pytest.mark.parametrize(
    "names",
    [
        ("t1_2023", "flair_2023"),
        ("scan_2021", "scan_2022"),
        ("p_t1_0000", "p_flair_0000"),
        ("p_0001", "p_0002"),
        ("flair", "x_0000"),
        ("t1/x_0000", "t2/x_0000"),
    ],
)
def test_numbers_that_are_not_those_of_all_channels_say_nothing_of_a_list(
    names, model_maker, image_maker, tmp_path, predict_here
):
    model_maker(channels=2)
    files = [image_maker(tmp_path / f"{name}.nii.gz") for name in names]
    assert len(predict_here([files], tmp_path / "out", disable_tta=True)) == 1


def test_a_year_stays_in_the_name_of_a_listed_case(trained, image_maker, tmp_path, predict_here):
    lists = [[image_maker(tmp_path / f"{name}.nii.gz")] for name in ("scan_2021", "scan_2022", "other_0000")]
    found = predict_here(lists, tmp_path / "out", disable_tta=True)
    assert sorted(file.name for file in found) == ["other.nii.gz", "scan_2021.nii.gz", "scan_2022.nii.gz"]


def test_unreadable_and_truncated_images_are_told_together(trained, images, tmp_path, predict_here, no_network):
    whole = (images / "a_0000.nii.gz").read_bytes()
    (images / "b_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    (images / "c_0000.nii.gz").write_bytes(b"this is no image")
    (images / "d_0000.nii.gz").write_bytes(whole[:-4])
    with pytest.raises(DatasetError) as error:
        predict_here(images, tmp_path / "out")
    b, c, d = str(error.value).splitlines()[1:]
    assert "b_0000.nii.gz: cannot be read (truncated: " in b
    assert "uncompressed bytes are there); write it again or remove it" in b
    assert "c_0000.nii.gz: cannot be read (" in c
    assert "d_0000.nii.gz: cannot be read (truncated" in d


def test_what_itk_says_of_a_file_is_told_in_its_last_sentence(model_maker, images, tmp_path, predict_here, no_network):
    model = model_maker()
    description = json.loads((model / "dataset.json").read_text())
    (model / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nrrd"}))
    folder = tmp_path / ("a long name " * 9)
    folder.mkdir()
    (folder / "a_0000.nrrd").write_bytes(b"this is no image")
    with pytest.raises(DatasetError, match=r"a_0000\.nrrd: cannot be read \(Unable to determine ImageIO") as error:
        predict_here(folder, tmp_path / "out")
    assert ".cxx" not in str(error.value)


def test_a_file_joined_from_two_gzip_members_is_no_truncated_file(trained, images, tmp_path, predict_here):
    import gzip

    unpacked = gzip.decompress((images / "a_0000.nii.gz").read_bytes())
    (images / "a_0000.nii.gz").write_bytes(gzip.compress(unpacked[:999]) + gzip.compress(unpacked[999:]))
    assert predict_here(images / "a_0000.nii.gz", tmp_path / "out", disable_tta=True)[0].is_file()


def test_a_four_dimensional_image_is_refused(trained, tmp_path, predict_here, no_network):
    image = sitk.GetImageFromArray(np.zeros((3, 8, 8, 8), dtype=np.float32), isVector=False)
    sitk.WriteImage(image, str(tmp_path / "x_0000.nii.gz"))
    with pytest.raises(DatasetError, match="the image has 4 dimensions"):
        predict_here(tmp_path / "x_0000.nii.gz", tmp_path / "out")


def test_nothing_to_predict_is_refused(trained, tmp_path, predict_here, no_network):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"no file ends in \.nii\.gz; give the folder of the images"):
        predict_here(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DatasetError, match="nowhere does not exist; give an image or a folder of images"):
        predict_here(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DatasetError, match=r"nowhere\.nii\.gz does not exist; correct the list"):
        predict_here([[tmp_path / "nowhere.nii.gz"]], tmp_path / "out")
    with pytest.raises(DatasetError, match="the list of cases is empty"):
        predict_here([], tmp_path / "out")


def test_two_cases_of_one_name_are_refused(trained, image_maker, tmp_path, predict_here, no_network):
    files = [[image_maker(tmp_path / patient / "scan_0000.nii.gz")] for patient in ("p1", "p2")]
    with pytest.raises(DatasetError, match="scan: two cases have this name"):
        predict_here(files, tmp_path / "out")


def test_arguments_that_do_not_fit_are_refused(trained, images, tmp_path, predict_here, no_network):
    for options, message in (
        ({"step_size": 0.0}, "-step_size 0.0: it is a fraction"),
        ({"prev_stage_predictions": "x"}, "belongs to cascades"),
        ({"model_folder": trained, "dataset": 501}, "leave out -d"),
        ({"precision": "fp8"}, "--precision fp8 is unknown"),
        ({"device": "tpu"}, "-device tpu is not a device"),
        ({"device": "cuda:99"}, "-device cuda:99: torch sees"),
    ):
        with pytest.raises(UsageError, match=message):
            predict_here(images, tmp_path / "out", **options)


def test_a_model_folder_can_be_named_and_moved(trained, images, tmp_path, predict_here, monkeypatch):
    shutil.copytree(trained / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres", tmp_path / "my model")
    monkeypatch.delenv("nnUNet_results")
    (written,) = predict_here(images / "a_0000.nii.gz", tmp_path / "out", model_folder=tmp_path / "my model")
    assert written.is_file()


def test_without_any_model_the_message_says_how_to_get_one(results, images, tmp_path, predict_here):
    with pytest.raises(CheckpointError, match="lgssl_train"):
        predict_here(images, tmp_path / "out")


def test_failed_cases_are_listed_at_the_end(trained, images, tmp_path, predict_here, monkeypatch):
    monkeypatch.setattr(module.LGSSLPredictor, "predict_files", lambda *a, **k: {"b": "MemoryError"})
    with pytest.raises(PredictionError, match=r"1 case\(s\) failed, 1 are written:\n  b: MemoryError") as error:
        predict_here(images, tmp_path / "out")
    assert error.value.exit_code == 1
