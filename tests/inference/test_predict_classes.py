"""lgssl_predict --classes: some classes of a model, decided over all of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.inference import predict as module
from lgssl_nnunet.inference.classes import ChosenClasses
from lgssl_nnunet.inference.predict import RECORD

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "ignore": 4}


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.mark.parametrize(
    "options",
    [{"precision": "fp32"}, {"precision": "stock"}, {"precision": "fp32", "save_probabilities": True}],
    ids=["slabs", "stock", "probabilities"],
)
def test_other_classes_become_background_and_values_stay(trained, images, tmp_path, predict_here, options):
    options = {"disable_tta": True, **options}
    (full,) = predict_here(images / "a_0000.nii.gz", tmp_path / "full", **options)
    (some,) = predict_here(images / "a_0000.nii.gz", tmp_path / "some", classes=["tumour"], **options)
    decided = read(full)
    assert set(np.unique(decided)) == {0, 1, 2}
    assert np.array_equal(read(some), np.where(decided == 2, 2, 0))
    assert read(some).dtype == decided.dtype
    if "save_probabilities" in options:
        kept, usual = (np.load(file.with_name("a.npz"))["probabilities"] for file in (some, full))
        assert np.array_equal(kept, usual)


def test_the_folder_says_which_classes_it_holds_and_its_dataset_json_fits(trained, images, tmp_path, predict_here):
    predict_here(images, tmp_path / "some", classes=["tumour", "kidney", "tumour"], disable_tta=True)
    predict_here(images, tmp_path / "full", disable_tta=True)
    some, full = (json.loads((tmp_path / name / RECORD).read_text())["settings"] for name in ("some", "full"))
    assert some.pop("classes") == ["kidney", "tumour"]
    assert some == full
    descriptions = [(tmp_path / name / "dataset.json").read_text() for name in ("some", "full")]
    assert descriptions[0] == descriptions[1]


def test_a_folder_with_other_classes_is_not_continued(trained, images, tmp_path, predict_here):
    options = {"disable_tta": True, "continue_prediction": True}
    predict_here(images / "a_0000.nii.gz", tmp_path / "out", classes=["kidney"], **options)
    asked = {"tumour": ["tumour"], "kidney, tumour": ["kidney", "tumour"], "not given": None}
    for words, others in asked.items():
        with pytest.raises(
            UsageError, match=rf"dataset, model or setting \(classes: kidney there, {words} asked\); choose"
        ):
            predict_here(images, tmp_path / "out", classes=others, **options)
    predict_here(images, tmp_path / "out", classes=["kidney"], **options)
    assert (tmp_path / "out" / "b.nii.gz").is_file()


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (["kidney", "spleen", "livr"], "the model has no class 'spleen', 'livr'"),
        (["background"], "the model has no class 'background'"),
        ([], "no class is named"),
    ],
)
def test_a_class_that_is_not_there_is_refused_by_name_before_any_work(
    trained, images, tmp_path, predict_here, monkeypatch, asked, problem
):
    for work in ("LGSSLPredictor", "collect_images"):
        monkeypatch.setattr(module, work, lambda *a, **k: pytest.fail("work began before the classes were checked"))
    with pytest.raises(UsageError) as error:
        predict_here(images, tmp_path / "out", classes=asked)
    assert str(error.value) == f"--classes: {problem}; choose among 'kidney', 'tumour'."
    assert not (tmp_path / "out").exists()


def test_a_class_that_the_model_was_never_trained_on_is_refused_by_name(
    model_maker, images, tmp_path, predict_here, caplog
):
    plans = model_maker() / "plans.json"
    plans.write_text(json.dumps(json.loads(plans.read_text()) | {"lgssl": {"unseen_classes": ["tumour"]}}))
    with pytest.raises(UsageError) as error:
        predict_here(images, tmp_path / "out", classes=["tumour", "livr"])
    assert str(error.value) == (
        "--classes: the model has no class 'livr' and the model was never trained on 'tumour', which no labelled case "
        "had; choose among 'kidney'."
    )
    predict_here(images, tmp_path / "some", classes=["kidney"], disable_tta=True)
    assert "never trained" not in caplog.text
    predict_here(images, tmp_path / "all", disable_tta=True)
    assert "The model was never trained on tumour: what it segments as such means nothing." in caplog.text


def test_ignore_is_no_class(model_maker, images, tmp_path, predict_here):
    model = model_maker()
    description = json.loads((model / "dataset.json").read_text())
    description["labels"]["ignore"] = 3
    (model / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UsageError, match="no class 'ignore'; choose among 'kidney', 'tumour'"):
        predict_here(images, tmp_path / "out", classes=["ignore"])


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_regions_that_are_not_chosen_are_not_painted(make):
    labels = ChosenClasses({"labels": REGIONS, "regions_class_order": [1, 2, 3]}, ["whole", "enhancing"])
    probabilities = make([[0.9, 0.9, 0.9, 0.1], [0.1, 0.9, 0.9, 0.9], [0.1, 0.1, 0.9, 0.1]])[:, :, None, None]
    before = probabilities + 0
    segmentation = labels.convert_probabilities_to_segmentation(probabilities)
    assert segmentation.ravel().tolist() == [1, 1, 3, 0]
    assert bool((probabilities == before).all())


def test_regions_are_written_by_name(model_maker, images, tmp_path, predict_here):
    model = model_maker()
    description = json.loads((model / "dataset.json").read_text())
    # Three heads, as the model has.
    description.update(labels={"background": 0, **{n: REGIONS[n] for n in ("whole", "core", "enhancing")}})
    description["regions_class_order"] = [1, 2, 3]
    (model / "dataset.json").write_text(json.dumps(description))
    written = {}
    for name, classes in (("full", None), ("some", ["core"])):
        for precision in ("fp32", "stock"):
            options = {"classes": classes, "precision": precision, "disable_tta": True}
            (file,) = predict_here(images / "a_0000.nii.gz", tmp_path / name / precision, **options)
            written[name, precision] = read(file)
    for precision in ("fp32", "stock"):
        assert set(np.unique(written["full", precision])) == {0, 1, 2, 3}
        core = written["some", precision] == 2
        assert set(np.unique(written["some", precision])) == {0, 2}
        assert core[written["full", precision] == 2].all()  # where enhancing was painted over it, core shows again
        assert not core[written["full", precision] < 2].any()
