"""Which model predicts when the user names few or none of its parts; no torch, no real checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.inference import models as lookup


def add(results: Path, name: str, folds=("0",), dataset="Dataset501_Tiny", age=0.0, checkpoint="checkpoint_final.pth"):
    for fold in folds:
        file = results / dataset / name / f"fold_{fold}" / checkpoint
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1e9 - age, 1e9 - age))


@pytest.fixture
def choose(tmp_path, monkeypatch):
    monkeypatch.setattr(lookup, "trainer_names", lambda: ["LGSSLTrainer", "SupervisedTrainer", "UAMTTrainer"])
    return lambda **options: lookup.choose_model(lookup.find_models(tmp_path), **options)


def test_models_are_found_with_their_coordinates_and_other_folders_are_ignored(tmp_path):
    add(tmp_path, "LGSSLTrainer__LGSSLPlans_labeled4__3d_fullres", folds=("1", "0", "10"))
    (tmp_path / "Dataset501_Tiny" / "ensembles" / "fold_0").mkdir(parents=True)
    (tmp_path / "Dataset501_Tiny" / "A__B__C" / "crossval_results").mkdir(parents=True)
    (tmp_path / "notes__and__plots" / "x__y__z").mkdir(parents=True)
    (model,) = lookup.find_models(tmp_path)
    assert (model.dataset, model.trainer) == ("Dataset501_Tiny", "LGSSLTrainer")
    assert (model.plans, model.configuration) == ("LGSSLPlans_labeled4", "3d_fullres")
    assert model.finished_folds == ("0", "1", "10")


def test_a_missing_results_folder_has_no_models(tmp_path):
    assert lookup.find_models(tmp_path / "nowhere") == []


def test_a_semi_supervised_model_goes_before_a_newer_supervised_one(tmp_path, choose):
    add(tmp_path, "SupervisedTrainer__P__3d_fullres", age=0)
    add(tmp_path, "nnUNetTrainer__nnUNetPlans__3d_fullres", age=1)
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", age=100)
    chosen = choose()
    assert chosen.model.trainer == "LGSSLTrainer"
    assert "newest semi-supervised one of 3" in chosen.reason


def test_of_several_semi_supervised_models_the_newest_predicts(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", age=100)
    add(tmp_path, "UAMTTrainer__P__3d_fullres", age=1)
    assert choose().model.trainer == "UAMTTrainer"


def test_an_unfinished_model_is_passed_over(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", checkpoint="checkpoint_latest.pth")
    add(tmp_path, "SupervisedTrainer__P__3d_fullres")
    assert choose().model.trainer == "SupervisedTrainer"


def test_each_coordinate_narrows_the_choice(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres")
    add(tmp_path, "SupervisedTrainer__Q__2d", age=5)
    assert choose(trainer="SupervisedTrainer").model.plans == "Q"
    assert choose(plans="Q").model.trainer == "SupervisedTrainer"
    assert choose(configuration="2d").model.trainer == "SupervisedTrainer"
    with pytest.raises(UsageError) as error:
        choose(trainer="LGSSLTrianer")
    assert str(error.value) == (
        "-tr LGSSLTrianer: no trained model in Dataset501_Tiny has it; did you mean LGSSLTrainer? "
        "There is LGSSLTrainer, SupervisedTrainer."
    )


def test_models_of_several_datasets_are_listed_with_the_flag_to_add(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres")
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", dataset="Dataset077_Other")
    with pytest.raises(UsageError, match=r"(?s)2 datasets.*-d 77 +Dataset077_Other.*-d 501 +Dataset501_Tiny") as error:
        choose()
    assert error.value.exit_code == 2
    for dataset in (77, "77", "077", "Dataset077_Other"):
        assert choose(dataset=dataset).model.dataset == "Dataset077_Other"


def test_a_second_dataset_without_finished_models_does_not_matter(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres")
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", dataset="Dataset077_Other", checkpoint="checkpoint_latest.pth")
    assert choose().model.dataset == "Dataset501_Tiny"


def test_an_unknown_dataset_names_those_that_have_models(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres")
    with pytest.raises(UsageError, match=r"-d 502: no trained model in nnUNet_results .* Dataset501_Tiny"):
        choose(dataset=502)


def test_no_model_and_no_finished_model_are_two_different_sentences(tmp_path, choose):
    with pytest.raises(CheckpointError, match="train one first"):
        choose()
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", checkpoint="checkpoint_latest.pth")
    with pytest.raises(CheckpointError, match=r"(?s)No model has checkpoint_final.*lgssl_train.*checkpoint_latest.pth"):
        choose()
    assert choose(checkpoint="checkpoint_latest.pth").folds == ("0",)


def test_all_finished_folds_predict_and_fold_all_predicts_alone(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", folds=("0", "2"))
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", folds=("1",), checkpoint="checkpoint_latest.pth")
    assert choose().folds == ("0", "2")
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", folds=("all",))
    assert choose().folds == ("all",)
    assert choose(folds=["2"]).folds == ("2",)
    with pytest.raises(CheckpointError, match=r"checkpoint_final.pth in fold 1.*with checkpoint_final.pth 0 2 all"):
        _one_line(choose, folds=[1])
    with pytest.raises(CheckpointError, match=r"fold 3 was never trained; train it, or choose .* folds 0 1 2 all"):
        _one_line(choose, folds=[3])


def _one_line(choose, **options):
    try:
        choose(**options)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("\n", " ")) from error


def test_the_choice_says_what_and_when(tmp_path, choose):
    add(tmp_path, "LGSSLTrainer__P__3d_fullres", folds=("all",))
    text = str(choose())
    assert text.startswith("Dataset501_Tiny LGSSLTrainer P 3d_fullres, fold all, checkpoint_final.pth of 2001-09-")


def test_a_named_model_folder_may_have_any_name(tmp_path):
    add(tmp_path, "my_model", dataset="somewhere")
    chosen = lookup.model_from_folder(tmp_path / "somewhere" / "my_model")
    assert chosen.folds == ("0",)
    assert chosen.model.checkpoint_file("0").is_file()
    assert str(chosen).startswith(f"{tmp_path / 'somewhere' / 'my_model'}, fold 0")


def test_a_wrong_model_folder_is_refused_with_the_right_one(tmp_path):
    add(tmp_path, "A__B__C")
    folder = tmp_path / "Dataset501_Tiny" / "A__B__C"
    with pytest.raises(CheckpointError, match=r"is one fold; give the model folder .*A__B__C and the fold with -f"):
        lookup.model_from_folder(folder / "fold_0")
    with pytest.raises(CheckpointError, match="is missing"):
        lookup.model_from_folder(folder / "nothing")
    with pytest.raises(CheckpointError, match="unpack it first"):
        lookup.model_from_folder(folder / "fold_0" / "checkpoint_final.pth")


def test_looking_up_models_imports_no_torch():
    code = "import sys, lgssl_nnunet.inference.models; print('torch' in sys.modules, 'nnunetv2' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8").stdout.split()
        == ["False"] * 2
    )
