"""Writing files so that none is ever seen half written, and telling whether a file has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lgssl_nnunet.errors import DatasetError

logger = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
_NEARLY_FULL = 200e6
"""Bytes; less than that is free when a case of usual size could not be written."""


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, or nested more deeply than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DatasetError: the file is missing or is not JSON.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: the file does not exist; create it or check the folder's name.") from None
    except ValueError as error:
        raise DatasetError(f"{path}: the file is not valid JSON ({error}); correct it.") from None


def read_json_if_valid(path: Path) -> Any | None:
    """Return the content of a JSON file that this package wrote, None if it is missing or damaged."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_atomically(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary name beside `path`, then move the result into place.

    Readers see the old content or the new one, never a part; a failed write leaves the old one and nothing else.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        write(temporary)
        move_into_place({temporary: path})
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(files: Mapping[Path, Path]) -> None:
    """Give finished files their final names, in the order given; what was there before is replaced.

    The content is on the disk before a name points to it: without that, a power cut can leave an empty file under the
    final name.

    Args:
        files: final name by temporary name, on the same disk.
    """
    for temporary in files:
        if not temporary.is_symlink():
            _sync(temporary)
    for temporary, path in files.items():
        os.replace(temporary, path)
    for folder in {path.parent for path in files.values()}:
        _sync_folder(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder; nothing may be writing there."""
    for file in folder.glob(f".*{_TEMPORARY}*"):
        file.unlink(missing_ok=True)


def warn_if_disk_is_full(folder: Path) -> None:
    """Say so if a folder's disk is nearly full: libraries that cannot write often name another reason."""
    free = shutil.disk_usage(folder).free
    if free < _NEARLY_FULL:
        logger.warning("%s: only %.0f MB are free on this disk, which may be the reason.", folder, free / 1e6)


def file_record(path: Path) -> dict[str, Any]:
    """Return size, modification time in ns and SHA-256 of a file, by which `is_unchanged` knows it again."""
    status = path.stat()
    return {"size": status.st_size, "modified": status.st_mtime_ns, "sha256": sha256(path)}


def is_unchanged(path: Path, record: Mapping[str, Any] | None) -> bool:
    """Whether a file is what it was when the record was made.

    A file of another size is not; one of the same size and time is; one of the same size and another time, for example
    a copy, is read and compared.

    Args:
        path: the file.
        record: from `file_record`; None, as in folders of earlier versions, asks only for a file.
    """
    try:
        status = path.stat()
        if record is None or (status.st_size, status.st_mtime_ns) == (record["size"], record["modified"]):
            return True
        return status.st_size == record["size"] and sha256(path) == record["sha256"]
    except OSError:
        return False


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(file: Path) -> None:
    """Wait until a file's content is on the disk; an error that the system had not reported yet is raised here."""
    handle = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk, where the system can do that."""
    with contextlib.suppress(OSError):  # Windows opens no folder, and some network file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
