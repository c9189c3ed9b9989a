"""A file is written whole or not at all; what has changed is told from signatures and hashes."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from lgssl_nnunet import files
from lgssl_nnunet.errors import DatasetError
from lgssl_nnunet.files import (
    content_hash,
    copy_file,
    environment,
    file_record,
    file_signature,
    is_unchanged,
    link_file,
    read_json,
    read_json_if_valid,
    remove_leftovers,
    write_atomically,
    write_json,
)


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("disk full")


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path):
    file = tmp_path / "checkpoint_latest.pth"
    write_atomically(file, lambda temporary: torch.save({"epoch": 1}, temporary))
    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(file, lambda t: torch.save({"weights": torch.zeros(1000), "broken": Unsavable()}, t))
    assert torch.load(file) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_a_kill_between_writing_and_moving_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "plans.json"
    write_json({"old": True}, file)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json({"old": False}, file)
    assert json.loads(file.read_text()) == {"old": True}


def test_the_file_is_complete_before_it_gets_its_name(tmp_path):
    file = tmp_path / "curve.csv"
    seen = []

    def write(temporary):
        temporary.write_text("half")
        seen.append(file.exists())
        temporary.write_text("whole")

    write_atomically(file, write)
    assert seen == [False]
    assert file.read_text() == "whole"


def test_the_temporary_name_lies_beside_the_file_and_hides_from_listings(tmp_path):
    names = []
    write_atomically(str(tmp_path / "a.json"), lambda t: (names.append(t), t.write_text("{}")))
    assert names[0].parent == tmp_path
    assert names[0].name.startswith(".a.json.")


def test_json_keeps_the_order_of_the_keys(tmp_path):
    write_json({"z": 1, "a": [1, 2]}, tmp_path / "plans.json")
    assert list(json.loads((tmp_path / "plans.json").read_text())) == ["z", "a"]


def test_the_environment_is_restored_even_after_an_error(monkeypatch):
    monkeypatch.setenv("LGSSL_A", "before")
    monkeypatch.delenv("LGSSL_B", raising=False)

    def fail_inside():
        with environment({"LGSSL_A": "1", "LGSSL_B": "2"}):
            assert os.environ["LGSSL_B"] == "2"
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail_inside()
    assert os.environ["LGSSL_A"] == "before"
    assert "LGSSL_B" not in os.environ


def test_a_copy_of_a_read_only_file_can_be_replaced(tmp_path):
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    source.write_text("a")
    source.chmod(0o444)
    copy_file(source, target)
    assert file_signature(target)[1:] == file_signature(source)[1:]
    copy_file(source, target)
    target.write_text("b")


def test_a_hash_does_not_depend_on_the_order_of_keys():
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1}) != content_hash({"a": 1, "b": [3]})


def test_the_content_is_on_the_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    order = []
    real_replace = os.replace
    monkeypatch.setattr(files, "_sync", lambda file: order.append(("sync", file.suffix)))
    monkeypatch.setattr(files, "_sync_folder", lambda folder: order.append(("sync", folder.name)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: order.append(("name", b.name)) or real_replace(a, b))
    write_json({}, tmp_path / "plans.json")
    assert order == [("sync", ".tmp"), ("name", "plans.json"), ("sync", tmp_path.name)]


def test_an_error_that_only_syncing_reports_leaves_the_old_file(tmp_path, monkeypatch):
    write_json({"old": True}, tmp_path / "plans.json")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json({"old": False}, tmp_path / "plans.json")
    assert [file.name for file in tmp_path.iterdir()] == ["plans.json"]
    assert json.loads((tmp_path / "plans.json").read_text()) == {"old": True}


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    write_json({"old": True}, tmp_path / "plans.json")
    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write_json({"old": False, "many": list(range(10_000))}, tmp_path / "plans.json")
    assert [file.name for file in tmp_path.iterdir()] == ["plans.json"]
    assert json.loads((tmp_path / "plans.json").read_text()) == {"old": True}


def test_a_changed_file_is_told_from_a_copy_and_from_the_same(tmp_path):
    file = tmp_path / "case.b2nd"
    file.write_bytes(b"0123456789")
    record = json.loads(json.dumps(file_record(file)))
    assert is_unchanged(file, record)
    os.utime(file, ns=(1, 1))  # as after copying the folder
    assert is_unchanged(file, record)
    file.write_bytes(b"0123456x89")
    os.utime(file, ns=(1, 1))
    assert not is_unchanged(file, record)
    file.write_bytes(b"0123")
    assert not is_unchanged(file, record)
    assert is_unchanged(file, None)
    file.unlink()
    assert not is_unchanged(file, None)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    kept = ["case_0000.nii.gz", ".hidden", "notes.tmp"]
    for name in [*kept, ".case_0000.nii.gz.123.tmp", ".case_0000.nii.gz.123.tmp.nii.gz"]:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(kept)
    remove_leftovers(tmp_path / "not there")


def test_links_are_made_in_one_step(tmp_path):
    (tmp_path / "source").write_text("a")
    link_file(tmp_path / "source", tmp_path / "link")
    assert (tmp_path / "link").read_text() == "a"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", "\ufeff{}"])
def test_what_json_cannot_read_is_a_sentence_for_people_and_none_for_our_own_files(text, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=r"a\.json: the file is not valid JSON \(.+\); correct it"):
        read_json(tmp_path / "a.json")
    assert read_json_if_valid(tmp_path / "a.json") is None
