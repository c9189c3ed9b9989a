"""Damaged files as a person meets them: one sentence on the screen, an exit status that is not 0, nothing left."""

from __future__ import annotations

import logging
import pickle
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch

sys.path.insert(0, str(Path(__file__).parent))
from mutations import hostile, write
from watching import CANARY, EXAMPLES, files_below, watched

DEEP = b"[" * 100_000
MANY_DIGITS = b'{"labels": ' + b"9" * 5000 + b"}"
PLAN = ("plan_and_preprocess", "-d", "901", "-pl", "LGSSLPlannerCPU", "-npfp", "0")
TRAIN = ("train", "901", "3d_fullres", "LGSSLTrainer", "-device", "cpu")
PREDICT = ("predict", "-i", "images", "-o", "out", "-m", "model", "-device", "cpu")
EVALUATE = ("evaluate", "raw/labelsTr", "prediction", "-np", "0", "-djfile", "raw/dataset.json")


def nifti_claiming(size: int) -> bytes:
    """The header of an image of so many voxels along each axis, and no voxel."""
    header = bytearray(352)
    for place, value, length in ((0, 348, 4), (40, 3, 2), *((42 + 2 * i, size, 2) for i in range(3)), (70, 16, 2)):
        header[place : place + length] = value.to_bytes(length, "little")
    header[72:74], header[344:348] = (32).to_bytes(2, "little"), b"n+1\0"
    return bytes(header)


COMMANDS = {
    "nested dataset.json, planning": ("raw/dataset.json", DEEP, PLAN),
    "dataset.json with a long number, planning": ("raw/dataset.json", MANY_DIGITS, PLAN),
    "image that claims terabytes, planning": ("raw/imagesTr/labeled_000_0000.nii.gz", nifti_claiming(30_000), PLAN),
    "nested prompts": ("list", DEEP, ("prompts", "-d", "901", "--prompts", "list")),
    "bank that is a pickle": ("list", None, ("prompts", "-d", "901", "--text_encoder", "file:list")),
    "list of cases in another coding": ("list", b"\xff\xfe\0", (*PLAN, "--labeled_list", "list")),
    "plans that are no object, training": ("plans.json", b"[]", TRAIN),
    "plans cut off, training": ("plans.json", b'{"lgssl": {', (*TRAIN, "-p", "LGSSLCPUPlans")),
    "plans named elsewhere, training": ("plans.json", (b'"LGSSLCPUPlans"', b'"../../x"'), TRAIN),
    "layer that is a function, training": ("plans.json", (b"torch.nn.modules.conv.Conv3d", b"os.abort"), TRAIN),
    "nested plans, prediction": ("model/plans.json", DEEP, PREDICT),
    "checkpoint that runs something, prediction": ("model/fold_0/checkpoint_final.pth", None, PREDICT),
    "image that claims terabytes, prediction": ("images/a_0000.nii.gz", nifti_claiming(30_000), PREDICT),
    "nested dataset.json, evaluation": ("raw/dataset.json", DEEP, EVALUATE),
    "segmentation cut off, evaluation": ("prediction/labeled_000.nii.gz", b"\x1f\x8b\x08\0", EVALUATE),
}


@pytest.fixture
def place(tiny_dataset, model, tmp_path, monkeypatch) -> Path:
    """A folder with everything that the commands need, under short names; they work in it."""
    dataset = tiny_dataset().copied_to(tmp_path)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / f"nnUNet_{name}"))
    (tmp_path / "raw").symlink_to(dataset.raw)
    (tmp_path / "plans.json").symlink_to(dataset.plans_file)
    (tmp_path / "model").symlink_to(model)
    shutil.copytree(dataset.raw / "labelsTr", tmp_path / "prediction")
    (tmp_path / "images").mkdir()
    sitk.WriteImage(sitk.Image(8, 8, 8, sitk.sitkFloat32), str(tmp_path / "images/a_0000.nii.gz"))
    monkeypatch.chdir(tmp_path)
    package = logging.getLogger("lgssl_nnunet")
    handlers, level = list(package.handlers), package.level
    yield tmp_path
    package.handlers[:], package.level = handlers, level


def damage(file: Path, content: bytes | tuple[bytes, bytes] | None, canary: Path) -> None:
    """Write the content, or replace the first text by the second; None stands for objects that run something."""
    if content is None:
        objects = hostile(canary)
        torch.save({"network_weights": objects}, file) if file.suffix == ".pth" else write(file, pickle.dumps(objects))
    elif isinstance(content, tuple):
        assert content[0] in file.read_bytes()
        write(file, file.read_bytes().replace(*content))
    else:
        write(file, content)


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_command_says_what_is_wrong_in_a_sentence(kind, place, capsys):
    name, content, (command, *arguments) = COMMANDS[kind]
    damage(place / name, content, place / CANARY)
    before = files_below(place)
    with watched() as seen:
        status = import_module(f"lgssl_nnunet.cli.{command}").main(arguments)
    error = capsys.readouterr().err
    assert status in (1, 2)
    assert re.search(r"^[\w.-]+: error: .{20,}", error, re.MULTILINE)
    assert "Traceback" not in error
    assert seen == []
    after = files_below(place)
    assert {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)} <= {
        place / "nnUNet_preprocessed/Dataset901_Phantom/integrity.manifest.json"  # the other cases have passed
    }


def test_the_default_run_tries_enough():
    assert sum(EXAMPLES.values()) >= 500
