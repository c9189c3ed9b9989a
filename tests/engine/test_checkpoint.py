"""A file is written whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch

from lgssl_nnunet.engine import checkpoint
from lgssl_nnunet.engine.checkpoint import save_json, save_torch, write_atomically


class Unsavable:
    def __reduce__(self):
        raise RuntimeError("disk full")


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path):
    file = tmp_path / "checkpoint_latest.pth"
    save_torch({"epoch": 1}, file)
    with pytest.raises(RuntimeError, match="disk full"):
        save_torch({"weights": torch.zeros(1000), "broken": Unsavable()}, file)
    assert torch.load(file) == {"epoch": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


def test_a_kill_between_writing_and_moving_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "plans.json"
    save_json({"old": True}, file)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_json({"old": False}, file)
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
    save_json({"z": 1, "a": [1, 2]}, tmp_path / "plans.json")
    assert list(json.loads((tmp_path / "plans.json").read_text())) == ["z", "a"]
