"""Files that are either whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def write_atomically(path: Path | str, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name beside `path`, then move the result into place.

    An interrupted or failed write leaves an existing file as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_torch(content: dict[str, Any], path: Path | str) -> None:
    """Save a checkpoint atomically."""
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def save_json(content: dict[str, Any], path: Path | str) -> None:
    """Save a JSON file atomically, keys in the given order."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=4), encoding="utf-8"))
