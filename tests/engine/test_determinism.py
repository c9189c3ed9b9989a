"""The switch to deterministic algorithms: on within its block, and as before after it."""

from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.engine.determinism import deterministic_algorithms


def state() -> tuple[bool, bool, bool, bool]:
    cudnn = torch.backends.cudnn
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return cudnn.benchmark, cudnn.deterministic, enabled, warns


@pytest.mark.parametrize("benchmark", [True, False])
def test_it_is_on_within_the_block_and_as_before_after_it(benchmark, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    before = state()
    with deterministic_algorithms():
        assert state() == (False, True, True, True)
    assert state() == before
