"""Read a checkpoint file of nnU-Net's format: the one place where it is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lgssl_nnunet.errors import CheckpointError


def read_checkpoint(file: Path, *needed: str) -> dict[str, Any]:
    """Return a checkpoint of nnU-Net or of this package, its tensors on the CPU.

    Args:
        file: the checkpoint.
        needed: entries that must be there.

    Raises:
        CheckpointError: the file is missing, damaged or no checkpoint, or lacks a needed entry.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing.")
    try:
        # nnU-Net's checkpoints hold numpy objects, which torch's restricted reader refuses.
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file} cannot be read ({reason}); it is damaged or no checkpoint of nnU-Net."
        ) from error
    entries = checkpoint if isinstance(checkpoint, dict) else {}
    missing = [key for key in needed if key not in entries]
    if missing or not entries:
        raise CheckpointError(f"{file} has no {' and no '.join(missing) or 'entries'}; it is no checkpoint of nnU-Net.")
    return checkpoint
