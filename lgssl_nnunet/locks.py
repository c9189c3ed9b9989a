"""Locks that keep two commands from writing into one folder.

They are locks of the operating system: they end with the process that holds them, however it ends, so none is ever
stale. The lock file stays behind, empty; that it is there means nothing.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from lgssl_nnunet.errors import LGSSLError

logger = logging.getLogger(__name__)

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
"""What a file system without locks answers, such as NFS without its lock service."""


class FolderBusyError(LGSSLError):
    """Another process writes into the folder."""

    exit_code = 1


def lock_beside(folder: Path, purpose: str) -> Path:
    """Return the lock file for work of one kind on a folder; it lies beside the folder, which need not exist yet."""
    return folder.with_name(f".{folder.name}.{purpose}.lock")


@contextmanager
def hold_lock(file: Path, folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock for the time of a block; the same thread may take it several times.

    On a file system without locks the work goes on without one, after a warning.

    Args:
        file: the lock file; its folder is made if missing.
        folder: what the lock protects, for the message.
        wait: wait while another process holds it, instead of refusing.

    Raises:
        FolderBusyError: another process holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    # A singleton can be taken again by who holds it: a benchmark locks a dataset and then plans it.
    lock = FileLock(file, is_singleton=True)
    try:
        held = lock.acquire(blocking=wait)
    except Timeout:
        raise FolderBusyError(
            f"{folder}: another process is writing there; wait until it has ended and run this command again, or "
            f"choose another folder. (Its lock, {file.name}, ends with that process and need not be removed.)"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        logger.warning("%s: the file system has no locks (%s); let only one command write there.", folder, error)
        held = nullcontext()
    with held:
        yield
