"""Which device torch computes on: chosen automatically unless named, and always said."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lgssl_nnunet.errors import UsageError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ACCEPTED = "cpu, cuda, cuda:N (N is the number of the GPU) or mps"


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device to compute on and log it.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`, or None or `auto` for the best that is there (cuda, then mps, then cpu).
            A device has been chosen already and comes back as it is.

    Returns:
        The device.

    Raises:
        UsageError: the name is unknown or this machine has no such device.
    """
    import torch

    if isinstance(name, torch.device):
        return name
    automatic = name is None or name == "auto"
    device = torch.device(_best_kind()) if automatic else _named_device(name)
    logger.info("Device: %s%s", describe_device(device), " (chosen automatically, change with -device)" * automatic)
    return device


def describe_device(device: torch.device) -> str:
    """Return the device in words, with the GPU's name or the number of CPU threads."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def _best_kind() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _named_device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"-device {name} is not a device; use {ACCEPTED}.") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"-device {name} is not supported; use {ACCEPTED}.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(f"-device {name}: torch sees {count} CUDA GPU(s) here; use another one, or -device cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("-device mps: torch sees no Apple GPU here; use -device cpu.")
    return device
