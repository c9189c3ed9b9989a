"""Writing files so that none is ever seen half written, and telling whether a file has changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import DatasetError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DatasetError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: the file does not exist; create it or check the folder's name.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: the file is not valid JSON ({error}); correct it.") from None


def read_json_if_valid(path: Path) -> Any | None:
    """Return the content of a JSON file that this package wrote, None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_atomically(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary name beside `path`, then move the result into place.

    Readers see the old content or the new one, never a part; a failed write leaves the old one and nothing else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, path: Path | str) -> None:
    """Write a JSON file in one step, keys in the given order."""
    text = json.dumps(content, indent=4) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file in one step, with its modification time."""

    def copy(temporary: Path) -> None:
        shutil.copyfile(source, temporary)
        shutil.copystat(source, temporary)
        temporary.chmod(0o644)  # raw data is often read-only; a copy must stay replaceable

    write_atomically(target, copy)


def link_file(source: Path, target: Path) -> None:
    """Make a symbolic link in one step; on a system that forbids it, a hard link."""

    def link(temporary: Path) -> None:
        try:
            temporary.symlink_to(source.resolve())
        except OSError:
            os.link(source, temporary)

    write_atomically(target, link)


def file_signature(path: Path) -> list[str | int]:
    """Return path, size in bytes and modification time in ns; nothing is opened."""
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def content_hash(content: Any) -> str:
    """Return a hash of JSON-like content that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the time of a block and restore what was there before, whatever happens."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
