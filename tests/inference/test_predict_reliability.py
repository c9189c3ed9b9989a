"""Prediction when something goes wrong: a worker killed, a full disk, a second call, files that were left damaged."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from lgssl_nnunet.inference import predictor as module
from lgssl_nnunet.inference.predict import PredictionError, predict
from lgssl_nnunet.inference.predictor import Case, LGSSLPredictor
from lgssl_nnunet.locks import FolderBusyError

MODEL = Path("Dataset501_Tiny") / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
DEATHS = "LGSSL_TEST_DEATHS"
NOTES = "LGSSL_TEST_NOTES"
AS_NNUNET, READ, EXPORT = module._preprocess_as_nnunet, module.read_preprocessed, module._export


def die(name: str) -> None:
    """Kill this process if it works on case b, as often as the variable says."""
    if name != "b":
        return
    notes = Path(os.environ[NOTES])
    deaths = len(notes.read_text()) if notes.exists() else 0
    if deaths < int(os.environ[DEATHS]):
        notes.write_text("x" * (deaths + 1))
        os.kill(os.getpid(), signal.SIGKILL)


def deadly_as_nnunet(predictor, case):
    die(case.name)
    return AS_NNUNET(predictor, case)


def deadly_read(files, recipe):
    die(files[0].name.removesuffix("_0000.nii.gz"))
    return READ(files, recipe)


def deadly_export(predictor, results, properties, case, save_probabilities):
    (case.output.parent / ".partial_b_abcd1234").mkdir(parents=True, exist_ok=True)  # as if killed while writing
    die(case.name)
    EXPORT(predictor, results, properties, case, save_probabilities)


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch) -> Path:
    """The file that counts the deaths."""
    monkeypatch.setenv(NOTES, str(tmp_path / "deaths"))
    return tmp_path / "deaths"


def shown(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))


def predict_with_workers(images: Path, output: Path, **options) -> list[Path]:
    quick = {"device": "cpu", "disable_tta": True, "precision": "stock", "progress": False}
    workers = {"num_processes_preprocessing": 1, "num_processes_segmentation_export": 1}
    return predict(images, output, **{**quick, **workers, **options})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["stock", "fp32"])
def test_a_reader_killed_once_costs_nothing(precision, trained, images, tmp_path, monkeypatch, caplog, notes):
    monkeypatch.setattr(module, "_preprocess_as_nnunet", deadly_as_nnunet)
    monkeypatch.setattr(module, "read_preprocessed", deadly_read)
    monkeypatch.setenv(DEATHS, "1")
    predict_with_workers(images, tmp_path / "out", num_processes_segmentation_export=0, precision=precision)
    assert notes.read_text() == "x"
    assert [name for name in shown(tmp_path / "out") if name.endswith(".nii.gz")] == ["a.nii.gz", "b.nii.gz"]
    assert "Case b: its worker process was killed" in caplog.text


@pytest.mark.slow
def test_a_writer_killed_twice_is_named_and_the_others_are_written(
    trained, images, tmp_path, monkeypatch, predict_here, notes
):
    out = tmp_path / "out"
    monkeypatch.setattr(module, "_export", deadly_export)
    monkeypatch.setenv(DEATHS, "9")
    with pytest.raises(PredictionError, match=r"1 case\(s\) failed, 1 are written:\n  b: .*killed twice"):
        predict_with_workers(images, out, num_processes_preprocessing=0)
    assert [name for name in shown(out) if name.endswith(".nii.gz")] == ["a.nii.gz"]
    assert notes.read_text() == "xx"
    monkeypatch.setattr(module, "_export", EXPORT)
    predict_here(images, out, disable_tta=True, precision="stock", continue_prediction=True)
    assert (out / "b.nii.gz").is_file()
    assert not list(out.glob(".partial_*"))


def test_a_second_call_is_refused_in_a_sentence_and_changes_nothing(
    trained, images, tmp_path, predict_here, held_elsewhere, files_below
):
    out = tmp_path / "out"
    predict_here(images / "a_0000.nii.gz", out)
    before = files_below(out)
    with held_elsewhere(out / ".lgssl_predict_0_of_1.lock"):
        with pytest.raises(FolderBusyError, match=r"out: another process is writing there; wait"):
            predict_here(images, out, continue_prediction=True)
        assert files_below(out) == before
        predict_here(images, out, continue_prediction=True, num_parts=2, part_id=1)  # another part may work beside it
    assert "b.nii.gz" in shown(out)
    predict_here(images, out, continue_prediction=True)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def shrink(file: Path) -> None:
    sitk.WriteImage(sitk.ReadImage(str(file))[1:], str(file))


def move(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    image.SetOrigin((0.0, 0.0, 0.0))
    sitk.WriteImage(image, str(file))


def stretch(file: Path) -> None:
    image = sitk.ReadImage(str(file))
    image.SetSpacing((3.0, 3.0, 3.0))
    sitk.WriteImage(image, str(file))


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "SimpleITKIOWithReorient", "NibabelIOWithReorient"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "cannot be read"),
        (shrink, "has shape [19, 16, 14] and its image has [20, 16, 14]"),
        (move, "has origin ["),
        (stretch, "has spacing [3.0, 3.0, 3.0] mm and its image has [1.0, 1.25, 1.5] mm"),
    ],
)
def test_a_segmentation_that_is_damaged_or_on_another_grid_is_not_skipped(
    damage, message, reader, model_maker, images, tmp_path, predict_here, caplog
):
    plans = model_maker() / "plans.json"
    plans.write_text(plans.read_text().replace("SimpleITKIO", reader))
    out = tmp_path / "out"
    predict_here(images, out)
    whole = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "a.nii.gz")))
    damage(out / "a.nii.gz")
    kept = (out / "b.nii.gz").stat().st_mtime_ns
    predict_here(images, out, continue_prediction=True)
    assert f"a.nii.gz {message}" in caplog.text
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(out / "a.nii.gz"))), whole)
    assert (out / "b.nii.gz").stat().st_mtime_ns == kept


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_segmentation_that_the_system_does_not_read_stays(
    error, trained, images, tmp_path, predict_here, monkeypatch
):
    out = tmp_path / "out"
    predict_here(images, out, disable_tta=True, save_probabilities=True)
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}

    def require_whole(file):
        raise error

    monkeypatch.setattr("lgssl_nnunet.inference.cases.require_whole", require_whole)
    with pytest.raises(type(error)):
        predict_here(images, out, disable_tta=True, save_probabilities=True, continue_prediction=True)
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_damaged_probabilities_are_not_skipped(trained, images, tmp_path, predict_here):
    out = tmp_path / "out"
    predict_here(images, out, save_probabilities=True)
    cut_off(out / "a.npz")
    predict_here(images, out, save_probabilities=True, continue_prediction=True)
    assert np.load(out / "a.npz")["probabilities"].shape[1:] == (14, 16, 20)


@pytest.mark.parametrize("precision", ["stock", "fp32"])
@pytest.mark.parametrize("type_", [np.int16, np.float32])
def test_an_image_with_a_damaged_byte_fails_alone_and_is_named(
    type_, precision, trained, images, tmp_path, predict_here
):
    array = np.random.default_rng(0).integers(0, 999, (64, 64, 64))  # of smaller files ITK sees the end with the header
    image = sitk.GetImageFromArray(array.astype(type_))
    sitk.WriteImage(image, str(images / "b_0000.nii.gz"))
    content = bytearray((images / "b_0000.nii.gz").read_bytes())
    content[-5] ^= 1  # in the checksum: it unpacks to its full length
    (images / "b_0000.nii.gz").write_bytes(content)
    with pytest.raises(PredictionError, match=r"1 are written:\n  b: .*b_0000\.nii\.gz: cannot be read \(CRC check"):
        predict_here(images, tmp_path / "out", precision=precision, disable_tta=True)
    assert [name for name in shown(tmp_path / "out") if name.endswith(".nii.gz")] == ["a.nii.gz"]


def test_damage_that_itk_reads_without_an_error_is_found_in_an_image_and_a_segmentation(
    model_maker, image_maker, tmp_path, predict_here, caplog
):
    dataset_json = model_maker() / "dataset.json"
    dataset_json.write_text(dataset_json.read_text().replace(".nii.gz", ".mha"))
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in "ab":
        file = image_maker(folder / f"{name}_0000.mha")
        sitk.WriteImage(sitk.ReadImage(str(file)), str(file), True)
    predict_here(folder, out, disable_tta=True)
    for file in (folder / "b_0000.mha", out / "a.mha", out / "b.mha"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 4  # in the checksum
        file.write_bytes(content)
        sitk.ReadImage(str(file))
    with pytest.raises(PredictionError, match=r"1 are written:\n  b: .*b_0000\.mha: cannot be read"):
        predict_here(folder, out, disable_tta=True, continue_prediction=True)
    assert "a.mha cannot be read" in caplog.text


@pytest.mark.parametrize("size", [0, 100, 400])
@pytest.mark.parametrize("precision", ["stock", "fp32"])
def test_a_full_disk_leaves_no_half_segmentation(precision, size, one_fold, images, tmp_path, full_disk, monkeypatch):
    """ITK writes the beginning of a NIfTI file to a full disk and reports no error."""

    def on_full_disk(*arguments):
        with full_disk(size):
            EXPORT(*arguments)

    monkeypatch.setattr(module, "_export", on_full_disk)
    predictor = LGSSLPredictor(torch.device("cpu"), precision=precision, use_mirroring=False, progress=False)
    predictor.load_model(one_fold / MODEL, [0])
    case = Case("a", (images / "a_0000.nii.gz",), tmp_path / "out" / "a.nii.gz")
    assert list(predictor.predict_files([case])) == ["a"]
    assert list((tmp_path / "out").iterdir()) == []
