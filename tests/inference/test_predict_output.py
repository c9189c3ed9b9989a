"""What stays in an output folder: never files of two models or settings under one record."""

from __future__ import annotations

import json

import pytest

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.inference import predictor as module
from lgssl_nnunet.inference.predict import RECORD

OLD, NEW = {"step_size": 1.0, "disable_tta": True}, {"step_size": 0.5, "disable_tta": True}
"""Settings decide voxels as the model does, so they stand for two models."""


@pytest.fixture
def three_images(images, image_maker):
    image_maker(images / "c_0000.nii.gz", seed=3)
    return images


def results(out) -> set[str]:
    return {file.name for file in out.iterdir() if file.name.endswith((".nii.gz", ".npz", ".pkl"))}


def step_size(out) -> float:
    return json.loads((out / RECORD).read_text())["settings"]["step_size"]


def test_what_overwrite_is_to_replace_goes_before_the_record_changes(
    trained, images, tmp_path, predict_here, monkeypatch
):
    infer = module.LGSSLPredictor._infer

    def killed_at_b(predictor, case, *arguments):
        if case.name == "b":
            raise KeyboardInterrupt
        return infer(predictor, case, *arguments)

    out = tmp_path / "out"
    predict_here(images, out, save_probabilities=True, **OLD)
    assert results(out) == {f"{name}.{kind}" for name in "ab" for kind in ("nii.gz", "npz", "pkl")}
    (out / "selection_maps").mkdir()
    for name in ("selection_maps/b.nii.gz", "selection_maps/b.png", "notes.txt", "summary.json"):
        (out / name).touch()
    monkeypatch.setattr(module.LGSSLPredictor, "_infer", killed_at_b)
    with pytest.raises(KeyboardInterrupt):
        predict_here(images, out, overwrite=True, **NEW)
    monkeypatch.setattr(module.LGSSLPredictor, "_infer", infer)
    assert step_size(out) == 0.5
    assert results(out) <= {"a.nii.gz"}
    assert not list((out / "selection_maps").iterdir())
    assert (out / "notes.txt").exists()
    assert (out / "summary.json").exists()
    predict_here(images, out, continue_prediction=True, **NEW)
    assert results(out) == {"a.nii.gz", "b.nii.gz"}


def test_nothing_old_stays_beside_a_segmentation_that_is_predicted_again(trained, images, tmp_path, predict_here):
    out = tmp_path / "out"
    predict_here(images, out, save_probabilities=True, **OLD)
    (out / "selection_maps").mkdir()
    maps = {out / "selection_maps" / f"{name}.{kind}" for name in "ab" for kind in ("nii.gz", "png")}
    for file in maps:
        file.touch()
    (out / "a.nii.gz").write_bytes(b"damaged")
    predict_here(images, out, continue_prediction=True, **OLD)
    assert results(out) == {"a.nii.gz", "b.nii.gz", "b.npz", "b.pkl"}
    assert {file for file in maps if file.exists()} == {file for file in maps if file.name.startswith("b.")}


def test_segmentations_that_lack_wanted_probabilities_are_not_lost_when_that_is_interrupted(
    trained, images, tmp_path, predict_here, monkeypatch
):
    def killed(*arguments):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    predict_here(images, out, **OLD)
    (out / "b.nii.gz").write_bytes(b"damaged")
    monkeypatch.setattr(module.LGSSLPredictor, "_infer", killed)
    with pytest.raises(KeyboardInterrupt):
        predict_here(images, out, continue_prediction=True, save_probabilities=True, **OLD)
    assert results(out) == {"a.nii.gz"}


def test_overwrite_refuses_to_leave_other_cases_of_another_model(
    trained, three_images, tmp_path, predict_here, files_below
):
    out = tmp_path / "out"
    predict_here(three_images, out, **OLD)
    before = files_below(out)
    with pytest.raises(UsageError, match=r"out holds b\.nii\.gz, c\.nii\.gz, of which no .* another output folder\."):
        predict_here(three_images / "a_0000.nii.gz", out, overwrite=True, **NEW)
    assert files_below(out) == before
    predict_here(three_images / "a_0000.nii.gz", out, overwrite=True, **OLD)
    after = files_below(out)
    assert after["a.nii.gz"] != before["a.nii.gz"]
    assert after["b.nii.gz"] == before["b.nii.gz"]


def test_parts_replace_another_model_and_leave_each_other_alone(trained, three_images, tmp_path, predict_here):
    out = tmp_path / "out"
    predict_here(three_images, out, save_probabilities=True, **OLD)
    predict_here(three_images, out, overwrite=True, num_parts=2, part_id=0, **NEW)
    assert results(out) == {"a.nii.gz", "c.nii.gz"}  # nothing of the old model waits under the new record for part 1
    written = {name: (out / name).stat().st_mtime_ns for name in results(out)}
    predict_here(three_images, out, overwrite=True, num_parts=2, part_id=1, **NEW)
    assert results(out) == {"a.nii.gz", "b.nii.gz", "c.nii.gz"}
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written


@pytest.mark.parametrize("part", [{}, {"num_parts": 2, "part_id": 0}, {"num_parts": 2, "part_id": 1}])
def test_segmentations_without_a_record_are_not_continued(part, trained, images, tmp_path, predict_here, files_below):
    out = tmp_path / "out"
    predict_here(images, out, **OLD)
    (out / RECORD).unlink()
    (out / "b.nii.gz").unlink()
    before = files_below(out)
    with pytest.raises(UsageError, match=r"out holds a\.nii\.gz, of which no .*, or replace them with --overwrite"):
        predict_here(images, out, continue_prediction=True, **part, **OLD)
    assert files_below(out) == before
    predict_here(images, out, overwrite=True, **OLD)
    assert results(out) == {"a.nii.gz", "b.nii.gz"}


def test_segmentations_of_other_cases_without_a_record_are_not_taken_over(trained, images, tmp_path, predict_here):
    out = tmp_path / "out"
    predict_here(images / "a_0000.nii.gz", out, **OLD)
    (out / RECORD).unlink()
    with pytest.raises(UsageError, match=r"out holds a\.nii\.gz, of which no"):
        predict_here(images / "b_0000.nii.gz", out, **OLD)
