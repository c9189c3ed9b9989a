"""lgssl_export_model: the bundle predicts what the folder predicts, and holds nothing that prediction does not need."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.inference.export_model import export_model
from lgssl_nnunet.inference.models import model_from_folder
from lgssl_nnunet.inference.predict import RECORD
from lgssl_nnunet.inference.shareable import shareable_plans
from lgssl_nnunet.inference.stored_model import read_stored_model

PATIENT = "meier_johanna_19510203"
EMBEDDINGS = np.random.default_rng(0).normal(size=(3, 8)).tolist()
SPLIT = {"labeled": [PATIENT, "a"], "unlabeled": [f"{PATIENT}_2"], "validation": [], "test": [f"{PATIENT}_3"]}
SECRETS = (PATIENT, "/Users/", "optimizer")


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def add_checkpoint(folder: Path, name: str, fold: str = "0", seed: int = 9) -> None:
    """Write a further checkpoint with other weights."""
    checkpoint = torch.load(folder / f"fold_{fold}" / "checkpoint_final.pth")
    torch.manual_seed(seed)
    weights = {key: torch.randn_like(value) for key, value in checkpoint["network_weights"].items()}
    torch.save({**checkpoint, "network_weights": weights}, folder / f"fold_{fold}" / name)


@pytest.fixture
def guided(model_maker) -> Path:
    """A model of LGSSLTrainer whose files hold everything that must stay at home."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from lgssl_nnunet.trainers.lg_ssl import LGSSLTrainer

    folder = model_maker(trainer="LGSSLTrainer", trained_by="LGSSLTrainer")
    options = {"text_encoder": f"file:/Users/{PATIENT}/bank.npz", "tvsf_stages": 2}
    block = {
        "schema_version": 1,
        "split": SPLIT,
        "twins": [[PATIENT, f"{PATIENT}_2"]],
        "partial_labels": {PATIENT: ["liver"]},
        "unseen_classes": ["spleen"],
        "sparse_annotation": {"planned_as": "LGSSLCPUPlans", "slices": {PATIENT: {"z": 1, "y": 2}}},
        "text": {"encoder": "file:bank.npz (all-MiniLM-L6-v2)", "embeddings": EMBEDDINGS},
        "training": {"seed": 3, "hyperparameters": options},
        "what comes later": {PATIENT: 1},
    }
    change(folder / "plans.json", lgssl=block)
    described = {
        "dataset": {PATIENT: {"images": [f"/Users/{PATIENT}.nii.gz"]}},
        "training": [PATIENT],
        "annotated": {PATIENT: ["liver"], "site": ["liver"]},
        "groups": {"site": [f"{PATIENT}_*"]},
        "licence": "MIT",
    }
    change(folder / "dataset.json", **described)
    (folder / "fold_0" / "training_log.txt").write_text(PATIENT)
    (folder / "crossval_results_folds_0").mkdir()
    (folder / "crossval_results_folds_0" / "postprocessing.pkl").write_bytes(b"\x80\x04N.")
    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    torch.manual_seed(1)
    network = LGSSLTrainer.build_network_architecture(plans, plans.get_configuration("3d_fullres"), 1, 3)
    file = folder / "fold_0" / "checkpoint_final.pth"
    more = {"optimizer_state": {"state": {}}, "logging": {PATIENT: 1}, "lgssl": {"terms": [PATIENT]}}
    torch.save({**torch.load(file), **more, "network_weights": network.state_dict()}, file)
    return folder


def text_of(file: Path) -> str:
    """All that an archive of uncompressed members holds, names and content, as text."""
    return file.read_bytes().decode("latin-1")


@pytest.mark.parametrize("precision", ["stock", "fp32"])
def test_a_bundle_segments_to_the_bit_as_its_folder_does(precision, model_maker, images, tmp_path, predict_here):
    folder = model_maker(folds=(0, 1, 2))
    bundle = export_model(tmp_path / "model.zip", model_folder=folder)
    options = {"precision": precision, "save_probabilities": True}
    for name, place in (("folder", folder), ("bundle", bundle)):
        predict_here(images, tmp_path / name, model_folder=place, **options)
    for case in "ab":
        one, other = (sitk.ReadImage(str(tmp_path / who / f"{case}.nii.gz")) for who in ("folder", "bundle"))
        assert np.array_equal(sitk.GetArrayFromImage(one), sitk.GetArrayFromImage(other))
        assert len(np.unique(sitk.GetArrayFromImage(one))) > 1
        one, other = (np.load(tmp_path / who / f"{case}.npz")["probabilities"] for who in ("folder", "bundle"))
        assert np.array_equal(one, other)
    records = [json.loads((tmp_path / who / RECORD).read_text()) for who in ("folder", "bundle")]
    assert records[1]["model"].pop("folder") == str(bundle.resolve())
    records[0]["model"].pop("folder")
    assert records[0]["model"] == records[1]["model"]


def test_selection_maps_of_a_bundle_are_those_of_its_folder(guided, images, tmp_path, predict_here):
    bundle = export_model(tmp_path / "model.zip", model_folder=guided)
    for name, place in (("folder", guided), ("bundle", bundle)):
        predict_here(images / "a_0000.nii.gz", tmp_path / name, model_folder=place, save_selection_maps=True)
    for file in ("a.nii.gz", "selection_maps/a.nii.gz"):
        one, other = (
            sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / who / file))) for who in ("folder", "bundle")
        )
        assert np.array_equal(one, other)
        assert one.std() > 0


def test_folds_and_checkpoints_of_a_bundle_are_chosen_as_those_of_a_folder(model_maker, images, tmp_path, predict_here):
    folder = model_maker(folds=(0, 1, 2))
    for fold in "01":
        add_checkpoint(folder, "checkpoint_best.pth", fold, seed=int(fold))
    checkpoints = ["checkpoint_final.pth", "checkpoint_best.pth"]
    bundle = export_model(tmp_path / "model.zip", model_folder=folder, folds=[0, 1], checkpoints=checkpoints)
    seen = set()
    for number, options in enumerate(({}, {"folds": ["1"]}, {"checkpoint": "checkpoint_best.pth"})):
        (file,) = predict_here(images / "a_0000.nii.gz", tmp_path / f"{number}", model_folder=bundle, **options)
        (wanted,) = predict_here(
            images / "a_0000.nii.gz", tmp_path / f"w{number}", model_folder=folder, **{"folds": [0, 1], **options}
        )
        assert file.read_bytes() == wanted.read_bytes()
        seen.add(file.read_bytes())
    assert len(seen) == 3
    with pytest.raises(CheckpointError, match=r"has no checkpoint_final\.pth of fold 2: choose with -f and -chk among"):
        predict_here(images, tmp_path / "out", model_folder=bundle, folds=[2])
    with pytest.raises(CheckpointError, match=r"has no latest\.pth: .* checkpoint_best\.pth of fold 1\."):
        predict_here(images, tmp_path / "out", model_folder=bundle, checkpoint="latest.pth")
    with pytest.raises(UsageError, match="nothing in a bundle could be run, so leave it out"):
        predict_here(images, tmp_path / "out", model_folder=bundle, trust_checkpoint=True)
    with pytest.raises(UsageError, match="leave out -d"):
        predict_here(images, tmp_path / "out", model_folder=bundle, dataset=501)


def test_a_bundle_holds_no_name_of_a_case_no_path_and_no_state_of_the_training(guided, tmp_path):
    bundle = export_model(tmp_path / "model.zip", model_folder=guided)
    assert [secret for secret in (*SECRETS, str(guided.parents[1])) if secret in text_of(bundle)] == []
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
        plans, dataset_json, manifest = (
            json.loads(archive.read(name)) for name in ("plans.json", "dataset.json", "manifest.json")
        )
    assert names == ["plans.json", "dataset.json", "fold_0/checkpoint_final.safetensors", "manifest.json"]
    assert plans["lgssl"] == {
        "schema_version": 1,
        "num_cases": {"labeled": 2, "unlabeled": 1, "validation": 0, "test": 1},
        "text": {"encoder": "file:bank.npz (all-MiniLM-L6-v2)", "embeddings": EMBEDDINGS},
        "training": {
            "seed": 3,
            "hyperparameters": {"text_encoder": "file:bank.npz (all-MiniLM-L6-v2)", "tvsf_stages": 2},
        },
        "unseen_classes": ["spleen"],
    }
    assert "configurations" in plans
    assert dataset_json["licence"] == "MIT"
    assert not {"dataset", "training", "annotated", "groups"} & set(dataset_json)
    assert {"lgssl_nnunet", "nnunetv2", "torch"} <= set(manifest["versions"])
    assert manifest["model"] == {
        "dataset": "Dataset501_Tiny",
        "trainer": "LGSSLTrainer",
        "plans": "LGSSLCPUPlans",
        "configuration": "3d_fullres",
    }


def test_the_plans_of_a_bundle_build_the_same_network(guided, same, tmp_path):
    bundle = export_model(tmp_path / "model.zip", model_folder=guided)
    networks = [read_stored_model(place, ["0"]).network_with_weights() for place in (guided, bundle)]
    assert same(*(dict(network.state_dict()) for network in networks))


def test_weights_under_several_names_are_written_once(one_fold, tmp_path):
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    (weights,) = read_stored_model(folder, ["0"]).weights.values()
    with zipfile.ZipFile(export_model(tmp_path / "model.zip", model_folder=folder)) as archive:
        size = archive.getinfo("fold_0/checkpoint_final.safetensors").file_size
    assert size < 0.55 * sum(tensor.nbytes for tensor in weights.values())  # with the names


def test_the_same_model_gives_the_same_bundle_and_a_bundle_can_be_exported_again(guided, tmp_path):
    first = export_model(tmp_path / "1.zip", model_folder=guided)
    second = export_model(tmp_path / "2.zip", model_folder=guided)
    third = export_model(tmp_path / "3.zip", model_folder=first)
    assert first.read_bytes() == second.read_bytes() == third.read_bytes()


def test_the_model_is_found_as_for_prediction_and_said(model_maker, tmp_path, caplog):
    model_maker()
    folder = model_maker(trainer="UAMTTrainer", trained_by="UAMTTrainer")
    os.utime(folder / "fold_0" / "checkpoint_final.pth", (1e9, 1e9))
    with caplog.at_level("INFO"):
        bundle = export_model(tmp_path / "model.zip", dataset=501)
    assert (
        "Model: Dataset501_Tiny UAMTTrainer LGSSLCPUPlans 3d_fullres, fold 0, checkpoint_final.pth of 2001"
        in caplog.text
    )
    assert str(model_from_folder(bundle)).endswith("(bundle named with -m)")
    assert model_from_folder(bundle).model.modified() == 1e9
    with pytest.raises(UsageError, match="-d 77: no trained model"):
        export_model(tmp_path / "other.zip", dataset=77)


def test_an_existing_file_is_kept_unless_asked_otherwise_and_a_failure_leaves_nothing(model_maker, tmp_path):
    folder, file = model_maker(), tmp_path / "out" / "model.zip"
    file.parent.mkdir()
    file.write_bytes(b"mine")
    with pytest.raises(UsageError, match="is there already; replace it with --overwrite"):
        export_model(file, model_folder=folder)
    with pytest.raises(UsageError, match="is a folder; give the file"):
        export_model(file.parent, model_folder=folder)
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="cannot be read"):
        export_model(file, model_folder=folder, overwrite=True)
    assert [entry.name for entry in file.parent.iterdir()] == ["model.zip"]
    assert file.read_bytes() == b"mine"
    shutil.rmtree(folder)
    export_model(file, model_folder=model_maker(), overwrite=True)
    assert model_from_folder(file).folds == ("0",)


def test_folds_that_are_no_one_model_are_refused(model_maker, tmp_path):
    folder = model_maker(folds=(0, 1))
    file = folder / "fold_1" / "checkpoint_final.pth"
    torch.save({**torch.load(file), "inference_allowed_mirroring_axes": (0,)}, file)
    with pytest.raises(CheckpointError, match=r"differ in trainer, .*checkpoint_final\.pth of fold 1 does\)"):
        export_model(tmp_path / "model.zip", model_folder=folder)
    assert export_model(tmp_path / "model.zip", model_folder=folder, folds=[1]).is_file()
    with pytest.raises(CheckpointError, match=r"has no best\.pth of fold 0 1; leave it out of -chk"):
        export_model(tmp_path / "b.zip", model_folder=folder, checkpoints=["checkpoint_final.pth", "best.pth"])


def test_what_would_not_predict_is_not_exported(model_maker, tmp_path):
    folder = model_maker()
    add_checkpoint(folder, "my best.pth")
    with pytest.raises(CheckpointError, match=r"my best\.pth of fold 0 cannot be named in a bundle"):
        export_model(tmp_path / "model.zip", model_folder=folder, checkpoints=["my best.pth"])
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 12]
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(CheckpointError, match="do not fit the network"):
        export_model(tmp_path / "model.zip", model_folder=folder)
    assert not list(tmp_path.glob("*.zip*"))


def test_a_checkpoint_that_is_trusted_becomes_a_bundle_that_needs_no_trust(model_maker, tmp_path):
    import itertools

    folder = model_maker()
    file = folder / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file), "extra": itertools.count()}, file)
    with pytest.raises(CheckpointError, match="ask for a bundle of lgssl_export_model"):
        export_model(tmp_path / "model.zip", model_folder=folder)
    bundle = export_model(tmp_path / "model.zip", model_folder=folder, trust_checkpoint=True)
    assert read_stored_model(bundle, ["0"]).network_with_weights() is not None


def test_plans_of_nnunet_itself_go_along_whole():
    plans = {"plans_name": "nnUNetPlans", "configurations": {}}
    assert shareable_plans(plans) == plans
