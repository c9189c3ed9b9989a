"""Several processes that train one model: their group, what they add up, and what they agree on.

Each function does nothing in a single process. Each of them, called in one process of a group, has to be called in all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from lgssl_nnunet.errors import TrainingError, UsageError

# What torchrun tells each process that it starts.
_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def is_launched() -> bool:
    """Whether torchrun (or `launch`) started this process as one of several."""
    return all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def num_processes() -> int:
    """Return the number of processes in the group, 1 without a group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_number() -> int:
    """Return this process's number in the group, 0 without a group: the process that writes."""
    return distributed.get_rank() if num_processes() > 1 else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Within the block, this process belongs to the group that torchrun started, if it did.

    Args:
        device: of which kind the devices are; of several GPUs each process takes the one of its number on its machine.

    Yields:
        The device of this process.

    Raises:
        UsageError: the devices cannot train together, or there are too few.
    """
    if not is_launched():
        yield device
        return
    device = own_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if process_number() > 0:
        # One process writes and tells.
        os.environ["nnUNet_wandb_enabled"] = "0"
        logging.getLogger("lgssl_nnunet").setLevel(logging.WARNING)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Return the device of this process, chosen by its number on its machine (LOCAL_RANK).

    Raises:
        UsageError: several processes cannot share devices of this kind, or there are too few.
    """
    check_devices(device, int(os.environ["LOCAL_RANK"]) + 1)
    if device.type != "cuda":
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def check_devices(device: torch.device, number: int) -> None:
    """Refuse devices with which `number` processes of one machine cannot train.

    Raises:
        UsageError: they are of another kind, one of them is named, or there are too few.
    """
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Several processes cannot train on -device {device}: use -device cuda, or -device cpu.")
    if device.type == "cpu":
        return
    if device.index is not None:
        raise UsageError(
            f"-device {device} names one GPU, and several processes train: give -device cuda, and choose the GPUs with "
            "the environment variable CUDA_VISIBLE_DEVICES."
        )
    found = torch.cuda.device_count()
    if number > found:
        raise UsageError(f"{number} processes on this machine, and torch sees {found} CUDA GPU(s): start as many.")


class _Sum(torch.autograd.Function):
    """Sum over the processes; the gradient of the sum is that of every process's loss."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        return _reduced(value.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _reduced(gradient.clone(memory_format=torch.contiguous_format))


def total(value: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, with gradient.

    A loss that each process computes from such sums has, averaged over the processes, the gradient of the whole batch.
    """
    return _Sum.apply(value) if num_processes() > 1 else value


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replace the gradient of each parameter of an optimiser by its mean over the processes.

    In one exchange after the backward pass. Torch's DistributedDataParallel would overlap the two, but takes one
    network and wants a gradient in each of its parameters, which deep supervision does not give to the coarsest layer:
    nnU-Net then weighs that by 1e-6, of which an optimiser with adaptive steps makes whole ones.
    """
    if num_processes() == 1:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = _reduced(torch.cat([gradient.reshape(-1) for gradient in gradients])) / num_processes()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


@torch.no_grad()
def copy_from_first(modules: Iterable[nn.Module]) -> None:
    """Give the modules the weights and buffers that they have in the first process."""
    if num_processes() == 1:
        return
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            first = tensor.contiguous()
            distributed.broadcast(first, 0)
            tensor.copy_(first)


def mean_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of named numbers with the mean over the processes in place of each number."""
    if num_processes() == 1 or not rows:
        return [dict(row) for row in rows]
    numbers = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64, device=_exchange_device())
    means = (_reduced(numbers) / num_processes()).tolist()
    return [
        {name: type(value)(mean) for (name, value), mean in zip(row.items(), of_row, strict=True)}
        for row, of_row in zip(rows, means, strict=True)
    ]


def said_by_any(word: str | None) -> str | None:
    """Return what a process says, of several the first one; None if none says anything."""
    if num_processes() == 1 or not _any(word is not None):
        return word
    words: list[str | None] = [None] * num_processes()
    distributed.all_gather_object(words, word)
    return next(said for said in words if said is not None)


@contextmanager
def failing_together(kind: type[Exception], elsewhere: Callable[[], Exception]) -> Iterator[None]:
    """Let a block that fails in one process fail in all of them, so that none waits for another later.

    Args:
        kind: the exception that is meant.
        elsewhere: makes the exception that is raised where the block itself did not fail.
    """
    failure = None
    try:
        yield
    except kind as error:
        failure = error
    failed_anywhere = _any(failure is not None)
    if failure is not None:
        raise failure
    if failed_anywhere:
        raise elsewhere()


def wait_for_all() -> None:
    """Return when every process has come here."""
    _any(False)


def _any(here: bool) -> bool:
    if num_processes() == 1:
        return here
    flag = torch.tensor([float(here)], device=_exchange_device())
    return bool(_reduced(flag).item())


def _exchange_device() -> torch.device:
    """Where tensors lie that the group can exchange."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")


def _reduced(tensor: Tensor) -> Tensor:
    """Return the tensor after its sum over the processes has been written into it.

    Raises:
        TrainingError: another process is gone.
    """
    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise TrainingError(
            f"Process {process_number()} of the training lost contact with another one, which has ended (its own "
            "message says why): the checkpoints are whole, and --c goes on from them."
        ) from error
    return tensor
