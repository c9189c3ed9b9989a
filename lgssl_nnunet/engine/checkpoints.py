"""Checkpoint files of nnU-Net's format: the one place where they are unpickled, and no code of them is run."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lgssl_nnunet.errors import CheckpointError, TrainingError
from lgssl_nnunet.files import write_atomically
from lgssl_nnunet.paths import CHECKPOINTS, FINAL_CHECKPOINT

logger = logging.getLogger(__name__)

# nnU-Net logs its losses as numpy numbers and names cases by numpy text; the second name is the one before numpy 2.
_NUMPY: list[Callable | tuple[Callable, str]] = [
    np.dtype,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float16", "float32", "float64", "str")),
]


def write_checkpoint(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint beside `file`, read it back, and only then let it replace what was there.

    Raises:
        TrainingError: it could not be written; what was there before is untouched.
    """

    def write(temporary: Path) -> None:
        torch.save(checkpoint, temporary)
        damage = _damage(temporary)
        if damage:
            raise OSError(f"what was written reads differently: {damage}")

    try:
        write_atomically(file, write)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter when the disk is full
        raise TrainingError(
            f"{file} could not be written ({_short(error)}); is the disk full? What was there before is untouched: "
            "make room, and go on with --c."
        ) from error


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """Return the final checkpoint of a fold folder, or the newest other one that is whole; None if there is none.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    files = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    files.sort(key=lambda file: (file.name == FINAL_CHECKPOINT, file.stat().st_mtime_ns), reverse=True)
    for number, file in enumerate(files):
        damage = _damage(file)
        if not damage:
            return file
        if number < len(files) - 1:
            logger.warning("%s is damaged (%s): it is left out, and the one before it is taken.", file, damage)
    if files:
        raise CheckpointError(
            f"{files[-1]} is damaged ({damage}), as is every checkpoint in {folder}. Move them away; --c then starts "
            "anew."
        )
    return None


def is_whole(file: Path) -> bool:
    """Whether a checkpoint is there and its checksums fit."""
    return file.is_file() and _damage(file) is None


def _damage(file: Path) -> str | None:
    """Return what is wrong with the bytes of a checkpoint, None if its checksums fit."""
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size:
                return "what it holds is said to be larger than the file"  # torch compresses nothing
            member = archive.testzip()
    except (OSError, EOFError, NotImplementedError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        return _short(error)  # zipfile raises the middle ones for what it cannot decompress or decrypt
    return f"the checksum of {member} does not fit" if member else None


def _short(error: Exception) -> str:
    """Return the first sentence of an error; torch's go on with advice to whoever wrote the program."""
    return " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__


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
    damage = _damage(file) if zipfile.is_zipfile(file) else None  # torch does not look at the checksums
    if damage:
        raise CheckpointError(f"{file} is damaged: {damage}. Get or make it again.")
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
        raise CheckpointError(
            f"{file} cannot be read ({_short(error)}); it is damaged or no checkpoint of nnU-Net: get it again from "
            "where it was trained, or take another one."
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
