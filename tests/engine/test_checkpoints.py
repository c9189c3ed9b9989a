"""The one reader of checkpoint files: what it refuses, and in which words."""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lgssl_nnunet.engine.checkpoints import newest_whole_checkpoint, read_checkpoint, write_checkpoint
from lgssl_nnunet.errors import CheckpointError, TrainingError


def test_a_checkpoint_is_returned_with_what_is_needed(tmp_path):
    torch.save({"network_weights": {"a": torch.ones(2)}, "trainer_name": "X"}, tmp_path / "a.pth")
    checkpoint = read_checkpoint(tmp_path / "a.pth", "network_weights", "trainer_name")
    assert torch.equal(checkpoint["network_weights"]["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"network_weights": {}}, "has no trainer_name and no init_args; it is no checkpoint"),
        ([1, 2], "has no network_weights and no trainer_name and no init_args"),
    ],
)
def test_what_is_lacking_is_named(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / "a.pth", "network_weights", "trainer_name", "init_args")


def test_a_list_is_no_checkpoint_where_nothing_is_needed(tmp_path):
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="has no entries"):
        read_checkpoint(tmp_path / "a.pth")


def test_damaged_and_missing_files_are_refused(tmp_path):
    torch.save({"network_weights": {}}, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"cut\.pth cannot be read \(.*; it is damaged"):
        read_checkpoint(tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth is missing"):
        read_checkpoint(tmp_path / "none.pth")


class RunsSomething:
    """An object whose reading writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_that_a_file_asks_for_is_run(tmp_path):
    torch.save({"network_weights": RunsSomething(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=r"a\.pth holds more than tensors and numbers \(.*pathlib\..*--trust_check"
    ):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


def test_a_trusted_file_is_read_with_a_warning(tmp_path, caplog):
    torch.save({"network_weights": RunsSomething(tmp_path / "ran")}, tmp_path / "a.pth")
    read_checkpoint(tmp_path / "a.pth", trust=True)
    assert (tmp_path / "ran").exists()
    assert "because you trust it" in caplog.text


@pytest.mark.parametrize("old", [False, True], ids=["now", "before numpy 2"])
def test_numpy_numbers_are_read_under_their_name_of_either_numpy(tmp_path, old):
    values = [np.float32(1.5), np.float64(2.5), np.int64(3), np.bool_(True), np.float16(0.5)]
    torch.save({"logging": values}, tmp_path / "a.pth")
    if old:
        rename_numpy(tmp_path / "a.pth")
    found = read_checkpoint(tmp_path / "a.pth")["logging"]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def rename_numpy(file):
    """Give numpy's module the name that it has in files from before numpy 2."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert b"numpy.core" in b"".join(zipfile.ZipFile(file).read(name) for name in entries)


# ------------------------------------------------------------------------------------------------ writing and choosing


def with_a_changed_bit(file: Path) -> None:
    """Change one bit of the weights, which torch itself does not notice."""
    content = bytearray(file.read_bytes())
    content[content.index(np.ones(64, np.float32).tobytes())] ^= 1
    file.write_bytes(content)


def checkpoint_of(value: float) -> dict:
    return {"network_weights": {"a": torch.ones(64)}, "value": value}


def test_a_changed_bit_is_noticed(tmp_path):
    write_checkpoint(checkpoint_of(1), tmp_path / "a.pth")
    with_a_changed_bit(tmp_path / "a.pth")
    torch.load(tmp_path / "a.pth")  # a positive control: why it takes our own look at the checksums
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged: the checksum of .* does not fit"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch, error):
    def fail(checkpoint, file):
        file.write_bytes(b"half")
        raise error

    write_checkpoint(checkpoint_of(1), tmp_path / "a.pth")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(TrainingError, match=r"a\.pth could not be written .*is the disk full"):
        write_checkpoint(checkpoint_of(2), tmp_path / "a.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pth"]
    assert read_checkpoint(tmp_path / "a.pth")["value"] == 1


def test_what_reads_differently_than_it_was_written_does_not_replace_the_last_one(tmp_path, monkeypatch):
    save = torch.save

    def damaged(checkpoint, file):
        save(checkpoint, file)
        with_a_changed_bit(file)

    write_checkpoint(checkpoint_of(1), tmp_path / "a.pth")
    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(TrainingError, match="reads differently"):
        write_checkpoint(checkpoint_of(2), tmp_path / "a.pth")
    assert read_checkpoint(tmp_path / "a.pth")["value"] == 1


@pytest.fixture
def fold(tmp_path) -> Path:
    """A fold folder with the latest checkpoint older than the best one."""
    for age, name in ((200, "latest"), (100, "best")):
        file = tmp_path / f"checkpoint_{name}.pth"
        write_checkpoint(checkpoint_of(age), file)
        os.utime(file, (time.time() - age,) * 2)
    return tmp_path


def test_the_newest_is_taken(fold):
    assert newest_whole_checkpoint(fold).name == "checkpoint_best.pth"


def test_the_final_one_is_taken_however_old_it_is(fold):
    write_checkpoint(checkpoint_of(300), fold / "checkpoint_final.pth")
    os.utime(fold / "checkpoint_final.pth", (0, 0))
    assert newest_whole_checkpoint(fold).name == "checkpoint_final.pth"


def test_a_damaged_one_is_left_out_and_named(fold, caplog):
    with_a_changed_bit(fold / "checkpoint_best.pth")
    assert newest_whole_checkpoint(fold).name == "checkpoint_latest.pth"
    assert "checkpoint_best.pth is damaged (the checksum of" in caplog.text


def test_without_a_whole_one_nothing_is_taken_in_silence(fold, tmp_path):
    for file in fold.glob("*.pth"):
        with_a_changed_bit(file)
    with pytest.raises(CheckpointError, match=r"as is every checkpoint in .* Move them away"):
        newest_whole_checkpoint(fold)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert newest_whole_checkpoint(tmp_path) is None


def test_a_checkpoint_that_would_become_larger_than_its_file_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(CheckpointError, match="is damaged: what it holds is said to be larger than the file"):
        read_checkpoint(tmp_path / "a.pth")


def test_a_checkpoint_with_a_password_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged: .*password"):
        newest_whole_checkpoint(tmp_path) or read_checkpoint(tmp_path / "a.pth")
