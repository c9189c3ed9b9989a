"""Which arithmetic and memory layout a device gets: one code path for CUDA, CPU and MPS."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def cpu_has_bf16() -> bool:
    """Whether this processor computes bfloat16 natively; emulation is many times slower than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def training_precision(
    device: torch.device, patch_size: Sequence[int], strides: Sequence[Sequence[int]]
) -> torch.dtype:
    """Return the type in which a training step computes convolutions.

    CUDA: float16, as stock nnU-Net (with its gradient scaler). CPU: bfloat16 where the processor has it. MPS: float32.

    Args:
        device: where the network trains.
        patch_size: of the network's input.
        strides: of the encoder's stages, one number per axis.
    """
    if device.type == "cuda":
        return torch.float16
    if device.type == "cpu" and cpu_has_bf16() and not has_maps_of_two_slices(patch_size, strides):
        return torch.bfloat16
    return torch.float32


def has_maps_of_two_slices(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> bool:
    """Whether a 3D network has feature maps that are exactly two slices deep.

    On those, the weight gradient of a bfloat16 convolution reads memory that nobody has written (torch 2.14.1 on
    AVX-512: any size within the slices, any number of channels; other depths, 2D and float32 are right).
    """
    depths = itertools.accumulate(
        (stride[0] for stride in strides), lambda depth, by: -(-depth // by), initial=patch_size[0]
    )
    return len(patch_size) == 3 and 2 in depths


def training_autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Return the context of a training step on `device` in the type of `training_precision`."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, dtype=precision)


def preferred_memory_format(device: torch.device, num_dimensions: int) -> torch.memory_format:
    """Return the layout in which convolutions are fastest: channels last on CPUs (measured 1.5x on AVX2)."""
    if device.type != "cpu":
        return torch.contiguous_format
    return torch.channels_last_3d if num_dimensions == 3 else torch.channels_last


def to_float(outputs: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Return logits in float32, per scale where there are several: losses are computed outside autocast."""
    if isinstance(outputs, (list, tuple)):
        return [output.float() for output in outputs]
    return outputs.float()


def move_network(network: nn.Module, device: torch.device, num_dimensions: int) -> nn.Module:
    """Move a network to `device` in the preferred layout."""
    return network.to(device, memory_format=preferred_memory_format(device, num_dimensions))
