"""The one reader of checkpoint files: what it refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.engine.checkpoints import read_checkpoint
from lgssl_nnunet.errors import CheckpointError


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
