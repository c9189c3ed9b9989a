from __future__ import annotations

import re
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from lgssl_nnunet.cli.plan_and_preprocess import build_parser, main


def move_label(writer) -> str:
    label = sitk.ReadImage(str(writer.label_file("lab_01")))
    label.SetOrigin((9.0, 0.0, 0.0))
    sitk.WriteImage(label, str(writer.label_file("lab_01")))
    return r"labelsTr/lab_01\.nii\.gz: has origin"


def remove_channel(writer) -> str:
    writer.image_file("unl_00", 1).unlink()
    return r"imagesTr/unl_00_0001\.nii\.gz: is missing"


def truncate_image(writer) -> str:
    file = writer.image_file("more_00", folder="imagesUn")
    file.write_bytes(file.read_bytes()[:-20])
    return r"imagesUn/more_00_0000\.nii\.gz: cannot be read"


def spoil_voxel(writer) -> str:
    file = writer.image_file("unl_00")
    image = nibabel.load(file)
    voxels = np.asarray(image.dataobj).astype(np.float32)
    voxels[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), file)
    return r"imagesTr/unl_00_0000\.nii\.gz: 1 voxels are NaN"


def use_unknown_value(writer) -> str:
    label = sitk.ReadImage(str(writer.label_file("lab_00")))
    sitk.WriteImage(label * 7, str(writer.label_file("lab_00")))
    return r"labelsTr/lab_00\.nii\.gz: holds the value 7, 14"


DAMAGES = [move_label, remove_channel, truncate_image, spoil_voxel, use_unknown_value]
QUICK = ["-pl", "LGSSLPlannerCPU", "-npfp", "0", "-np", "0", "--no_pbar", "-c", "3d_fullres"]


def test_the_command_prints_the_plans_file(raw_dataset, capsys):
    raw_dataset(labeled=3)
    assert main(["-d", "901", "--labeled", "2", "--no_pp", *QUICK]) == 0
    assert capsys.readouterr().out.strip().endswith("LGSSLCPUPlans_labeled2.json")


def test_an_error_is_one_sentence_and_exit_status_2(raw_dataset, capsys):
    raw_dataset(labeled=3)
    assert main(["-d", "901", "--labeled", "9", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "only 3 labelled cases" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_dataset_ends_with_status_2_the_name_of_the_file_and_without_plans(
    damage, raw_dataset, data_root, capsys
):
    message = damage(raw_dataset(labeled=2, channels=2))
    assert main(["-d", "901", *QUICK]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    left = {file.name for file in (data_root / "nnUNet_preprocessed").rglob("*.*")}
    assert left <= {"integrity.manifest.json", ".Dataset901_Tiny.planning.lock"}


def test_every_flag_reaches_the_function(monkeypatch, tmp_path, capsys):
    import lgssl_nnunet.plans.plan

    seen = {}
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(
        lgssl_nnunet.plans.plan,
        "plan_and_preprocess",
        lambda ids, **options: seen.update(options, ids=ids) or [tmp_path / "P.json"],
    )
    expected = {
        "ids": ["1", "Dataset002_B"],
        "planner": "PLANNER",
        "labeled": 3,
        "labeled_list": "LIST",
        "protocol": "PROTOCOL",
        "seed": 4,
        "prompts": "PROMPTS",
        "text_encoder": "ENCODER",
        "ensemble_prompts": True,
        "configurations": ["2d", "3d_lowres"],
        "gpu_memory_target": 5.5,
        "overwrite_target_spacing": [1.0, 2.0, 3.0],
        "overwrite_plans_name": "NAME",
        "preprocessor_name": "PREPROCESSOR",
        "verify": False,
        "clean": True,
        "preprocess": False,
        "num_processes": [6, 7],
        "num_processes_fingerprint": 8,
        "verbose": True,
        "progress": False,
    }
    words = (
        "-d 1 Dataset002_B -pl PLANNER --labeled 3 --labeled_list LIST --protocol PROTOCOL --seed 4 --prompts PROMPTS "
        "--text_encoder ENCODER --ensemble_prompts -c 2d 3d_lowres -gpu_memory_target 5.5 "
        "-overwrite_target_spacing 1 2 3 -overwrite_plans_name NAME -preprocessor_name PREPROCESSOR "
        "--no_verify --clean --no_pp -np 6 7 -npfp 8 --verbose --no_pbar"
    )
    assert main(words.split()) == 0
    assert seen == expected
    assert capsys.readouterr().out.strip() == str(tmp_path / "P.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-fpe", "Mine"], "-fpe is not supported"),
        (["--no_verify", "--verify_dataset_integrity"], "exclude each other"),
        (["-pl", "LGSSLPlaner"], "did you mean LGSSLPlanner"),
        (["--protocol", "la-litrature"], "did you mean la-literature"),
    ],
)
def test_flags_that_do_not_fit_are_refused(raw_dataset, capsys, flags, message):
    raw_dataset(labeled=3)
    assert main(["-d", "901", *QUICK, *flags]) == 2
    assert message in capsys.readouterr().err


def test_every_flag_of_nnunets_command_is_there():
    flags = {flag for action in build_parser()._actions for flag in action.option_strings}
    assert flags >= {
        "-d", "-fpe", "-npfp", "--verify_dataset_integrity", "--no_pp", "--clean", "-pl", "-gpu_memory_target",
        "-preprocessor_name", "-overwrite_target_spacing", "-overwrite_plans_name", "-c", "-np", "--verbose",
        "--no_pbar",
    }  # fmt: skip


def test_every_flag_is_explained_with_its_default():
    for action in build_parser()._actions:
        if action.option_strings and action.dest not in ("help", "debug", "raw", "preprocessed", "results"):
            assert action.required or "default" in (action.help or ""), action.option_strings


def test_help_needs_neither_torch_nor_nnunet():
    code = (
        "import sys; from lgssl_nnunet.cli.plan_and_preprocess import build_parser; build_parser().format_help(); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'nnunetv2', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
