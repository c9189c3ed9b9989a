"""Which arithmetic and memory layout a device gets."""

from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.engine import precision
from lgssl_nnunet.engine.precision import move_network, preferred_memory_format, to_float, training_autocast

CPU, MPS = torch.device("cpu"), torch.device("mps")


def dtype_under_autocast(device: torch.device) -> torch.dtype:
    with training_autocast(device):
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_a_cpu_trains_in_bfloat16_where_it_has_it(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert dtype_under_autocast(CPU) == torch.bfloat16


def test_a_cpu_without_bfloat16_is_not_made_to_emulate_it(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert dtype_under_autocast(CPU) == torch.float32


def test_mps_trains_in_float32():
    assert dtype_under_autocast(MPS) == torch.float32


def test_cuda_trains_in_float16_as_stock_nnunet():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this machine may have no CUDA
        context = training_autocast(torch.device("cuda"))
    assert context.fast_dtype == torch.float16
    assert context.device == "cuda"


@pytest.mark.parametrize(
    ("device", "dimensions", "expected"),
    [
        (CPU, 3, torch.channels_last_3d),
        (CPU, 2, torch.channels_last),
        (MPS, 3, torch.contiguous_format),
        (torch.device("cuda"), 2, torch.contiguous_format),
    ],
)
def test_cpus_get_channels_last(device, dimensions, expected):
    assert preferred_memory_format(device, dimensions) == expected


@pytest.mark.parametrize(("dimensions", "convolution"), [(2, torch.nn.Conv2d), (3, torch.nn.Conv3d)])
def test_a_moved_network_has_its_weights_in_the_preferred_layout(dimensions, convolution):
    network = move_network(convolution(3, 5, 3), CPU, dimensions)
    assert network.weight.is_contiguous(memory_format=preferred_memory_format(CPU, dimensions))


def test_logits_become_float32_at_every_scale():
    logits = torch.ones(1, dtype=torch.bfloat16)
    assert to_float(logits).dtype == torch.float32
    assert [scale.dtype for scale in to_float([logits, logits])] == [torch.float32] * 2
