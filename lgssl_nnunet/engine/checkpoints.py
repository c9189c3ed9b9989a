"""Read a checkpoint file of nnU-Net's format: the one place where it is unpickled, and no code of it is run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lgssl_nnunet.errors import CheckpointError

logger = logging.getLogger(__name__)

# nnU-Net logs its losses as numpy numbers and names cases by numpy text; the second name is the one before numpy 2.
_NUMPY: list[Callable | tuple[Callable, str]] = [
    np.dtype,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64", "str")),
]


def read_checkpoint(
    file: Path, *needed: str, device: torch.device | str = "cpu", trust: bool = False
) -> dict[str, Any]:
    """Return a checkpoint of nnU-Net or of this package.

    Args:
        file: the checkpoint.
        needed: entries that must be there.
        device: where its tensors go.
        trust: also run what else the file asks for; only for files whose source is trusted like a program's.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint, lacks a needed entry, or holds anything but
            tensors, numbers, text and containers of them.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing.")
    if trust:
        logger.warning("%s is read as a program is run, because you trust it.", file)
    try:
        with safe_globals(_NUMPY):
            checkpoint = torch.load(file, map_location=device, weights_only=not trust)
    except Exception as error:
        foreign = _foreign_objects(file)
        if foreign:
            raise CheckpointError(
                f"{file} holds more than tensors and numbers ({', '.join(foreign)}), which can run anything when it is "
                "read: ask for a bundle of lgssl_export_model. If you trust its source like a program's, "
                "lgssl_predict, lgssl_export_model and -pretrained_weights take it with --trust_checkpoint."
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file} cannot be read ({reason}); it is damaged or no checkpoint of nnU-Net."
        ) from error
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [key for key in needed if key not in entries]
    if missing or not entries:
        raise CheckpointError(f"{file} has no {' and no '.join(missing) or 'entries'}; it is no checkpoint of nnU-Net.")
    return checkpoint


def _foreign_objects(file: Path) -> list[str]:
    """Return what a checkpoint would import, beyond what is allowed; nothing if that cannot be told."""
    try:
        with safe_globals(_NUMPY):
            return sorted(get_unsafe_globals_in_checkpoint(file))[:5]
    except Exception:
        return []
