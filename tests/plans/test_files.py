from __future__ import annotations

import json
import os

import pytest

from lgssl_nnunet.plans import files
from lgssl_nnunet.plans.files import content_hash, copy_file, environment, file_signature, write_json


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json({"old": 1}, file)
    monkeypatch.setattr(files.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json({"new": 2}, file)
    assert json.loads(file.read_text()) == {"old": 1}


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
