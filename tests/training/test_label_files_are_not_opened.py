"""The kernel tells which files any process opens; labels outside the budget are not among them.

A hook in Python does not see what SimpleITK, blosc2 and worker processes open.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lgssl_nnunet.training import train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")

SHOWN = 2

_IN_NONBLOCK, _IN_OPEN = os.O_NONBLOCK, 0x20
_EVENT = struct.Struct("iIII")


@contextmanager
def openings(files: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield a list that holds, after the block, which of the files any process has opened in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(_IN_NONBLOCK)
    watches = {libc.inotify_add_watch(descriptor, os.fsencode(file), _IN_OPEN): file for file in files}
    assert descriptor >= 0
    assert min(watches) >= 0
    opened: list[Path] = []
    try:
        yield opened
        try:
            content = os.read(descriptor, 2**20)
        except BlockingIOError:
            content = b""
        opened.extend(dict.fromkeys(watches[_EVENT.unpack_from(content, at)[0]] for at in _starts(content)))
    finally:
        os.close(descriptor)


def _starts(content: bytes) -> Iterator[int]:
    at = 0
    while at < len(content):
        yield at
        at += _EVENT.size + _EVENT.unpack_from(content, at)[3]


def command(module: str, *words: str) -> None:
    """Run a command with worker processes of its own."""
    code = f"import sys; from lgssl_nnunet.cli.{module} import main; sys.exit(main(sys.argv[1:]))"
    variables = os.environ | {"nnUNet_n_proc_DA": "2", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *words], env=variables, check=True, capture_output=True)


@pytest.fixture
def labels(tmp_path, monkeypatch) -> dict[str, list[Path]]:
    """A raw phantom whose every image has a label file somewhere; its label files, inside and outside of the budget."""
    from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset

    raw = tmp_path / "nnUNet_raw"
    folder = write_phantom_dataset(
        raw, PhantomSpec(shape=(20, 24, 24), num_labeled=4, num_unlabeled=2, num_test=2, dataset_id=901), progress=False
    )
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    labeled = sorted((folder / "labelsTr").iterdir())
    for image in (folder / "imagesUn").iterdir():  # a label that nobody asked for, where nnU-Net would look for it
        shutil.copyfile(labeled[0], folder / "labelsTr" / image.name.replace("_0000", ""))
    shown = labeled[:SHOWN]
    (tmp_path / "shown.txt").write_text("\n".join(file.name.split(".")[0] for file in shown))
    outside = {*(folder / "labelsTr").iterdir(), *(folder / "labelsTs").iterdir()} - set(shown)
    assert len(outside) == 6
    return {"shown": shown, "outside": sorted(outside)}


def plan(tmp_path: Path) -> None:
    command(
        "plan_and_preprocess",
        *("-d", "901", "-pl", "LGSSLPlannerCPU", "-c", "3d_fullres", "-np", "2", "-npfp", "2"),
        *("--labeled_list", str(tmp_path / "shown.txt")),
    )


def test_the_kernel_tells_of_every_library(labels):
    readers = (
        "import SimpleITK, sys; SimpleITK.ReadImage(sys.argv[1])",
        "import nibabel, sys; nibabel.load(sys.argv[1]).get_fdata()",
        "import os, sys; os.open(sys.argv[1], os.O_RDONLY)",
    )
    for reader, file in zip(readers, labels["outside"], strict=False):
        with openings(labels["outside"]) as opened:
            subprocess.run([sys.executable, "-c", reader, str(file)], check=True)
        assert opened == [file], reader


@pytest.mark.slow
def test_planning_and_training_with_workers_open_the_labels_of_the_budget_only(labels, tmp_path):
    with openings([*labels["shown"], *labels["outside"]]) as opened:
        plan(tmp_path)
    assert sorted(opened) == labels["shown"]
    preprocessed = sorted((tmp_path / "nnUNet_preprocessed").rglob("*_seg.b2nd"))
    assert len(preprocessed) == SHOWN
    with openings([*preprocessed, *labels["outside"]]) as opened:
        command("train", "901", "3d_fullres", "LGSSLTrainer", "--epochs", "1", "--iterations_per_epoch", "4")
    assert sorted(opened) == preprocessed
    with openings([*labels["shown"], *labels["outside"]]) as opened:
        for trainer in ("SupervisedTrainer", "PseudoLabelTrainer"):  # which predicts the unlabelled cases
            train(901, trainer=trainer, device="cpu", progress=False, epochs=1, iterations_per_epoch=2)
    assert opened == []
