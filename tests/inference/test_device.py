"""The device is named or chosen; several GPUs are told apart by number."""

from __future__ import annotations

import logging

import pytest
import torch

from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.inference.device import choose_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device.index}")


def test_a_gpu_is_chosen_by_its_number(two_gpus, caplog):
    with caplog.at_level(logging.INFO, "lgssl_nnunet"):
        assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert caplog.messages == ["Device: cuda:1 (GPU number 1)"]


def test_a_gpu_that_is_not_there_is_refused(two_gpus):
    with pytest.raises(UsageError, match=r"-device cuda:2: torch sees 2 CUDA GPU\(s\) here"):
        choose_device("cuda:2")


def test_without_a_name_the_gpu_is_taken(two_gpus, caplog):
    with caplog.at_level(logging.INFO, "lgssl_nnunet"):
        assert choose_device().type == "cuda"
    assert "chosen automatically, change with -device" in caplog.text
