"""Freed memory is kept on a CPU with glibc, and nothing changes elsewhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lgssl_nnunet.engine import allocation
from lgssl_nnunet.engine.allocation import keep_freed_memory
from lgssl_nnunet.trainers import base


@pytest.fixture
def settings(monkeypatch):
    """What the C library was asked to do; nothing reaches the real one."""
    asked = {}
    library = SimpleNamespace(mallopt=lambda parameter, value: asked.update({parameter: value}) or 1)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: library)
    return asked


def use_library(monkeypatch, name: str) -> None:
    monkeypatch.setattr(allocation.platform, "libc_ver", lambda: (name, "2.39"))


@pytest.mark.parametrize("library", ["", "musl"])
def test_without_glibc_nothing_is_switched(library, settings, monkeypatch):
    use_library(monkeypatch, library)
    assert keep_freed_memory() is False
    assert settings == {}


def test_with_glibc_no_block_is_mapped_anew_and_none_is_given_back(settings, monkeypatch):
    use_library(monkeypatch, "glibc")
    assert keep_freed_memory() is True
    # M_MMAP_MAX (-4) and M_TRIM_THRESHOLD (-1) of glibc's malloc.h.
    assert settings == {-4: 0, -1: -1}


def test_a_refusal_of_the_library_is_told(settings, monkeypatch):
    use_library(monkeypatch, "glibc")
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *arguments: 0))
    assert keep_freed_memory() is False


@pytest.mark.skipif(allocation.platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_real_library_takes_the_settings():
    assert keep_freed_memory() is True


@pytest.mark.parametrize(("device", "expected"), [("cpu", 1), ("meta", 0)])
def test_a_trainer_asks_for_it_on_a_cpu_only(device, expected, build_trainer, monkeypatch):
    called = []
    monkeypatch.setattr(base, "keep_freed_memory", lambda: called.append(True))
    trainer = build_trainer("SupervisedTrainer")
    trainer.device = torch.device(device)  # "meta" stands for a GPU: a device that is no CPU and is always there
    trainer.initialize()
    assert len(called) == expected
