from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lgssl_nnunet.errors import DatasetError, PlansError, PromptError, SplitError, UsageError
from lgssl_nnunet.text.bank import EmbeddingBank


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def preprocessed(data_root):
    return data_root / "nnUNet_preprocessed" / "Dataset901_Tiny"


def test_the_block_of_the_plans_is_complete(raw_dataset, plan_tiny, caplog):
    caplog.set_level("INFO")
    raw_dataset(labeled=6, unlabeled=2, in_images_un=1, test=2)
    file = plan_tiny(labeled=4, seed=3, preprocess=False)
    assert file.name == "LGSSLCPUPlans_labeled4_s3.json"
    block = json.loads(file.read_text())["lgssl"]
    assert set(block) == {"schema_version", "split", "draw_seed", "schedule", "text", "mirroring_axes", "twins"}
    split = block["split"]
    assert (len(split["labeled"]), len(split["unlabeled"]), split["validation"]) == (4, 5, [])
    assert split["test"] == ["test_00", "test_01"]
    assert block["draw_seed"] == 3
    assert block["schedule"]["optimizer"] == "adamw"
    assert block["mirroring_axes"] is None
    text = block["text"]
    assert set(text) == {"encoder", "prompts", "embeddings", "sha256"}
    assert [("liver" in prompt, "spleen" in prompt) for prompt in text["prompts"]][1:] == [(True, False), (False, True)]
    assert np.asarray(text["embeddings"]).shape[0] == 3
    assert "found 6 labelled, 3 unlabelled and 2 test cases" in caplog.text
    assert "planning with 4 labelled and 5 unlabelled cases" in caplog.text


SCHEDULES = {
    "gpu": {
        "optimizer": "sgd",
        "initial_lr": 1e-2,
        "weight_decay": 3e-5,
        "lr_schedule": "poly",
        "num_epochs": 1000,
        "iterations_per_epoch": 250,
        "val_iterations_per_epoch": 50,
    },
    "cpu": {
        "optimizer": "adamw",
        "initial_lr": 2e-3,
        "weight_decay": 1e-2,
        "lr_schedule": "cosine",
        "num_epochs": 20,
        "iterations_per_epoch": 50,
        "val_iterations_per_epoch": 4,
    },
}


@pytest.mark.parametrize(
    ("planner", "schedule", "name"),
    [
        ("LGSSLPlanner", "gpu", "LGSSLPlans.json"),
        ("nnUNetPlannerResEncM", "gpu", "LGSSLResEncMPlans.json"),
        ("LGSSLPlannerCPU", "cpu", "LGSSLCPUPlans.json"),
    ],
)
def test_plans_carry_the_schedule_of_their_planner_and_its_name(raw_dataset, plan_tiny, planner, schedule, name):
    raw_dataset(labeled=2)
    file = plan_tiny(planner=planner, preprocess=False)
    assert file.name == name
    assert json.loads(file.read_text())["lgssl"]["schedule"] == SCHEDULES[schedule]


def test_a_prompt_file_changes_the_embedding_of_its_class_and_no_other(raw_dataset, plan_tiny, tmp_path):
    def text(**options):
        return json.loads(plan_tiny(preprocess=False, **options).read_text())["lgssl"]["text"]

    raw_dataset(labeled=2)
    (tmp_path / "prompts.json").write_text(json.dumps({"liver": "pancreas"}))
    plain, other = text(), text(prompts=tmp_path / "prompts.json")
    assert "liver" in plain["prompts"][1]
    assert "pancreas" in other["prompts"][1]
    assert [a != b for a, b in zip(plain["prompts"], other["prompts"], strict=True)] == [False, True, False]
    assert [a != b for a, b in zip(plain["embeddings"], other["embeddings"], strict=True)] == [False, True, False]


def test_averaged_prompts_are_recorded_with_what_was_averaged(raw_dataset, plan_tiny, tmp_path, caplog):
    caplog.set_level("INFO")
    raw_dataset(labeled=2)
    (tmp_path / "prompts.json").write_text(json.dumps({"liver": ["hepar", "pancreas"]}))
    file = plan_tiny(preprocess=False, prompts=tmp_path / "prompts.json", ensemble_prompts=True)
    text = json.loads(file.read_text())["lgssl"]["text"]
    sentences = [f"A computerized tomography of a {name}" for name in ("background", "liver", "spleen")]
    assert text["prompts"] == sentences
    assert text["several_texts"] == {"liver": [sentences[1], "A computerized tomography of a pancreas"]}
    assert text["templates"][:2] == ["A computerized tomography of {}", "A CT scan showing {}"]
    np.testing.assert_allclose(np.linalg.norm(text["embeddings"], axis=1), 1, atol=1e-6)
    assert "Prompt of liver: 'A computerized tomography of a pancreas' (bank, by sentence)" in caplog.text


def test_classes_with_one_embedding_are_warned_of(raw_dataset, plan_tiny, caplog):
    raw_dataset(labeled=2, labels={"background": 0, "postcava": 1, "IVC": 2})
    plan_tiny(preprocess=False)
    assert "Classes postcava and IVC have the same embedding" in caplog.text


def test_a_prompt_that_nothing_can_embed_is_refused_with_the_ways_out(
    raw_dataset, plan_tiny, preprocessed, tmp_path, monkeypatch
):
    from lgssl_nnunet.text import encoders

    monkeypatch.setattr(encoders, "missing_packages", lambda: ["transformers"])  # as without the extra
    raw_dataset(labeled=2)
    (tmp_path / "prompts.json").write_text(json.dumps({"spleen": "a photograph of a bicycle"}))
    with pytest.raises(PromptError) as caught:
        plan_tiny(prompts=tmp_path / "prompts.json")
    for part in ("'spleen'", "a photograph of a bicycle", "--prompts FILE", "[text]", "--text_encoder"):
        assert part in str(caught.value)
    assert "liver" not in str(caught.value)
    assert not preprocessed.exists()


def without_times(files: dict[str, bytes]) -> dict[str, bytes]:
    """Leave out when a preprocessed file was written, which the manifest notes."""
    return {name: re.sub(rb'"modified": \d+', b"", content) for name, content in files.items()}


@pytest.mark.parametrize("poison", ["garbage", "deleted"])
def test_labels_outside_the_budget_change_nothing(raw_dataset, plan_tiny, preprocessed, tmp_path, poison):
    writer = raw_dataset(labeled=4, unlabeled=1, in_images_un=1)
    (tmp_path / "list.txt").write_text("lab_00\nlab_02\n")
    plan_tiny(labeled_list=tmp_path / "list.txt")
    expected = without_times(files_below(preprocessed))
    shutil.rmtree(preprocessed)
    for case in ("lab_01", "lab_03", "more_00"):
        if poison == "garbage":
            writer.label_file(case).write_bytes(b"poison")
        else:
            writer.label_file(case).unlink(missing_ok=True)
    plan_tiny(labeled_list=tmp_path / "list.txt")
    assert without_times(files_below(preprocessed)) == expected


def test_planning_with_all_labels_first_changes_nothing_for_a_budget(raw_dataset, plan_tiny, preprocessed):
    raw_dataset(labeled=6)
    fresh = plan_tiny(labeled=4).read_bytes()
    shutil.rmtree(preprocessed)
    plan_tiny()
    assert plan_tiny(labeled=4).read_bytes() == fresh


def test_planning_again_under_one_name_keeps_nothing_of_the_old_plans(raw_dataset, plan_tiny):
    raw_dataset(labeled=3)
    fresh = plan_tiny(overwrite_plans_name="P", preprocess=False).read_bytes()
    plan_tiny(overwrite_plans_name="P", preprocess=False, labeled=1, planner="LGSSLPlanner")
    assert plan_tiny(overwrite_plans_name="P", preprocess=False).read_bytes() == fresh


def test_dataset_json_is_copied_as_it_stands(raw_dataset, plan_tiny, preprocessed):
    writer = raw_dataset(labeled=2)
    plan_tiny(preprocess=False)
    assert (preprocessed / "dataset.json").read_bytes() == (writer.folder / "dataset.json").read_bytes()


def test_nnunet_reads_the_plans_and_the_preprocessed_cases(raw_dataset, plan_tiny, preprocessed):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw_dataset(labeled=2)
    configuration = PlansManager(str(plan_tiny())).get_configuration("3d_fullres")
    data, seg, _, properties = nnUNetDatasetBlosc2(str(preprocessed / configuration.data_identifier)).load_case(
        "lab_00"
    )
    assert data.shape == seg.shape
    assert len(properties["class_locations"][1])


def test_no_unlabelled_case_is_allowed_with_a_warning(raw_dataset, plan_tiny, caplog):
    raw_dataset(labeled=2, unlabeled=0, in_images_un=0)
    plan_tiny(preprocess=False)
    assert "no unlabelled case: only SupervisedTrainer" in caplog.text


def test_regions_and_an_ignore_label_go_through(raw_dataset, plan_tiny):
    labels = {"background": 0, "liver": [1, 2], "liver tumor": 2, "ignore": 3}
    raw_dataset(labeled=2, labels=labels, regions_class_order=[1, 2])
    text = json.loads(plan_tiny().read_text())["lgssl"]["text"]
    assert len(text["prompts"]) == len(text["embeddings"]) == 2
    assert text["regions"] is True


def test_sided_classes_block_mirroring_along_left_and_right(raw_dataset, plan_tiny):
    raw_dataset(labeled=2, labels={"background": 0, "left kidney": 1, "right kidney": 2})
    block = json.loads(plan_tiny(preprocess=False).read_text())["lgssl"]
    assert block["mirroring_axes"] == [0, 1]
    assert block["left_right"] == {"axis": 2, "sign": 1}


@pytest.mark.parametrize("names", [("lkidney", "rkidney"), ("LAG", "RAG"), ("LV", "RV"), ("LLL", "RLL")])
def test_sides_in_abbreviations_block_mirroring_whatever_the_encoder(names, raw_dataset, plan_tiny, tmp_path):
    raw_dataset(labeled=2, labels={"background": 0, names[0]: 1, names[1]: 2})
    assert json.loads(plan_tiny(preprocess=False).read_text())["lgssl"]["mirroring_axes"] == [0, 1]
    prompts = ["background", *names]
    EmbeddingBank(tuple(prompts), np.eye(3, dtype=np.float32), "other", "0").save(tmp_path / "bank.npz")
    file = plan_tiny(preprocess=False, text_encoder=f"file:{tmp_path / 'bank.npz'}")
    assert json.loads(file.read_text())["lgssl"]["mirroring_axes"] == [0, 1]


def test_sides_in_any_of_several_texts_block_mirroring(raw_dataset, plan_tiny, tmp_path):
    raw_dataset(labeled=2, labels={"background": 0, "a": 1, "b": 2})
    for texts, axes in (
        ({"a": ["kidney", "left kidney"], "b": ["spleen", "right kidney"]}, [0, 1]),
        ({"a": ["left kidney", "right kidney"], "b": "spleen"}, None),
    ):
        (tmp_path / "prompts.json").write_text(json.dumps(texts))
        file = plan_tiny(preprocess=False, prompts=tmp_path / "prompts.json")
        assert json.loads(file.read_text())["lgssl"]["mirroring_axes"] == axes


def test_two_dimensional_png_images_go_through(data_root, plan_tiny):
    folder = data_root / "nnUNet_raw" / "Dataset902_Flat"
    random = np.random.default_rng(0)
    for sub in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / sub).mkdir(parents=True)
    for index in range(4):
        labeled = index < 2
        pixels = random.integers(1, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("imagesTr" if labeled else "imagesUn") / f"c{index}_0000.png")
        if labeled:
            mask = (pixels[..., 0] > 128).astype(np.uint8)
            Image.fromarray(mask).save(folder / "labelsTr" / f"c{index}.png")
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "liver": 1},
        "numTraining": 2,
        "file_ending": ".png",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    plans = json.loads(plan_tiny("Dataset902_Flat", configurations=("2d", "3d_fullres")).read_text())
    assert list(plans["configurations"]) == ["2d"]
    out = data_root / "nnUNet_preprocessed" / "Dataset902_Flat"
    assert (out / "LGSSLCPUPlans_2d" / "c0_seg.b2nd").exists()
    assert (out / "LGSSLCPUPlans_2d_unlabeled" / "c3.b2nd").exists()
    with pytest.raises(PlansError, match="has no configuration 3d_fullres; it has 2d"):
        plan_tiny("Dataset902_Flat")


def test_single_slice_volumes_get_the_two_dimensional_configuration(raw_dataset, plan_tiny):
    raw_dataset(labeled=2, unlabeled=1, in_images_un=0, geometry={"shape": (1, 32, 40)})
    plans = json.loads(plan_tiny(configurations=("2d",)).read_text())
    assert list(plans["configurations"]) == ["2d"]


def test_several_datasets_are_planned_in_one_call(raw_dataset):
    from lgssl_nnunet import plan_and_preprocess

    raw_dataset(labeled=1)
    raw_dataset(labeled=1, number=902)
    options = {"planner": "LGSSLPlannerCPU", "preprocess": False, "progress": False, "num_processes_fingerprint": 0}
    assert len(plan_and_preprocess([901, "902"], **options)) == 2


def test_the_folders_are_stated_when_the_variables_are_not_set(raw_dataset, plan_tiny, data_root, monkeypatch, caplog):
    raw_dataset(labeled=1)
    monkeypatch.chdir(data_root)
    monkeypatch.delenv("nnUNet_preprocessed")
    assert plan_tiny(preprocess=False).is_relative_to(data_root / "nnUNet_preprocessed")
    assert "nnUNet_preprocessed is not set: using" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"planner": "LGSSLPlaner"}, UsageError, "did you mean LGSSLPlanner"),
        ({"configurations": ("3d_cascade_fullres",)}, UsageError, "not supported"),
        ({"configurations": ("3d_fulres",)}, UsageError, "did you mean 3d_fullres"),
        ({"configurations": ()}, UsageError, "one or more"),
        ({"overwrite_target_spacing": (1.0, 1.0)}, UsageError, "three positive numbers"),
        ({"overwrite_target_spacing": (1.0, 0.0, 1.0)}, UsageError, "three positive numbers"),
        ({"overwrite_plans_name": "a/b"}, UsageError, "plain name"),
        ({"overwrite_plans_name": "a__b"}, UsageError, "double underscore"),
        ({"preprocessor_name": "Nothing"}, UsageError, "DefaultPreprocessor"),
        ({"gpu_memory_target": 8.0}, UsageError, "no meaning for LGSSLPlannerCPU"),
        ({"gpu_memory_target": -1.0, "planner": "LGSSLPlanner"}, UsageError, "positive number"),
        ({"num_processes": (1, 2)}, UsageError, "-np"),
        ({"num_processes_fingerprint": -1}, UsageError, "-npfp"),
        ({"labeled": 9}, SplitError, "only 2 labelled"),
        ({"prompts": "nowhere.json"}, PromptError, "nowhere.json"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    raw_dataset, plan_tiny, preprocessed, options, error, message
):
    raw_dataset(labeled=2)
    with pytest.raises(error, match=message):
        plan_tiny(**options)
    assert not preprocessed.exists()


def test_a_class_without_embedding_is_refused_before_any_image_is_read(raw_dataset, plan_tiny, monkeypatch):
    from lgssl_nnunet.text import encoders

    def refuse(prompts, encoder):
        raise PromptError(f"{encoder} has no prompt for {prompts[1].class_name}")

    monkeypatch.setattr(encoders, "embed_prompts", refuse)
    writer = raw_dataset(labeled=2)
    writer.image_file("lab_00").write_bytes(b"")
    with pytest.raises(PromptError, match="bank has no prompt for liver"):
        plan_tiny()


def test_plans_of_nnunet_are_not_overwritten(raw_dataset, plan_tiny, preprocessed):
    raw_dataset(labeled=2)
    preprocessed.mkdir()
    (preprocessed / "nnUNetPlans.json").write_text('{"plans_name": "nnUNetPlans"}')
    with pytest.raises(UsageError, match="not written by lgssl_plan_and_preprocess"):
        plan_tiny(overwrite_plans_name="nnUNetPlans")


def test_a_damaged_dataset_is_refused_with_and_without_the_integrity_check(raw_dataset, plan_tiny, preprocessed):
    writer = raw_dataset(labeled=2, channels=2)
    writer.image_file("lab_01", 1).unlink()
    for verify in (True, False):
        with pytest.raises(DatasetError, match=r"lab_01_0001.nii.gz: is missing"):
            plan_tiny(verify=verify)
    assert not list(preprocessed.glob("*Plans*"))
