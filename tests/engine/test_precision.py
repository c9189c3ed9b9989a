"""Which arithmetic and memory layout a device gets."""

from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.engine import precision
from lgssl_nnunet.engine.precision import (
    has_maps_of_two_slices,
    move_network,
    preferred_memory_format,
    to_float,
    training_autocast,
    training_precision,
)

CPU, MPS, CUDA = torch.device("cpu"), torch.device("mps"), torch.device("cuda")
HALVED = [[1, 1, 1], [2, 2, 2], [2, 2, 2]]


@pytest.fixture
def native_bf16(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)


def test_a_cpu_trains_in_bfloat16_where_it_has_it(native_bf16):
    assert training_precision(CPU, (24, 32, 32), HALVED) == torch.bfloat16
    assert training_precision(CPU, (32, 32), [[1, 1], [2, 2]]) == torch.bfloat16


def test_a_cpu_without_bfloat16_is_not_made_to_emulate_it(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert training_precision(CPU, (24, 32, 32), HALVED) == torch.float32


def test_other_devices_have_a_type_of_their_own(native_bf16):
    assert training_precision(MPS, (24, 32, 32), HALVED) == torch.float32
    assert training_precision(CUDA, (8, 32, 32), HALVED) == torch.float16


@pytest.mark.parametrize(
    ("patch_size", "strides", "expected"),
    [
        ((8, 32, 32), HALVED, True),
        ((7, 32, 32), HALVED, True),
        ((2, 32, 32), [[1, 1, 1]], True),
        ((2, 32, 32), [[1, 1, 1], [1, 2, 2]], True),
        ((4, 24, 24), [[1, 1, 1], [2, 2, 2], [2, 2, 2]], True),
        ((12, 8, 8), HALVED, False),
        ((4, 32, 32), [[1, 1, 1], [1, 2, 2]], False),
        ((1, 32, 32), [[1, 1, 1]], False),
        ((2, 32), [[1, 1]], False),
    ],
)
def test_maps_of_two_slices_are_found_at_every_stage(patch_size, strides, expected, native_bf16):
    assert has_maps_of_two_slices(patch_size, strides) is expected
    assert (training_precision(CPU, patch_size, strides) == torch.float32) is expected


@pytest.mark.skipif(not precision.cpu_has_bf16(), reason="this processor has no bfloat16")
@pytest.mark.parametrize("depth", [1, 3, 4, 6])
def test_bfloat16_gradients_read_no_foreign_memory_where_they_are_used(depth):
    """What `has_maps_of_two_slices` keeps out: at depth 2 the NaN below turn up in the gradient."""
    convolution = torch.nn.Conv3d(16, 16, 3, padding=1).to(memory_format=torch.channels_last_3d)
    image = torch.randn(2, 16, depth, 8, 8).to(memory_format=torch.channels_last_3d)
    for _ in range(10):
        for size in (300, 1000, 5000, 20_000, 100_000):
            torch.full((size,), float("nan"))
        convolution.zero_grad()
        with training_autocast(CPU, torch.bfloat16):
            output = convolution(image)
        output.float().square().mean().backward()
        assert bool(torch.isfinite(convolution.weight.grad).all())


def test_the_context_computes_in_the_type():
    for dtype in (torch.float32, torch.bfloat16):
        with training_autocast(CPU, dtype):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


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
