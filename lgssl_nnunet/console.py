"""The package's messages on the console."""

from __future__ import annotations

import logging
import sys


class _ConsoleHandler(logging.StreamHandler):
    """Console handler that always writes to the current stderr; there is at most one of it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(_LevelFormatter("%(message)s"))


class _LevelFormatter(logging.Formatter):
    """Plain lines for information; warnings and errors carry their level."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname}: {text}"


def start_console_logging(level: int = logging.INFO) -> None:
    """Send the package's messages of a level and above to stderr, and nowhere else.

    Not to the root logger too: batchgenerators configures that, and every message would be printed a second time.
    """
    package = logging.getLogger("lgssl_nnunet")
    for handler in [h for h in package.handlers if isinstance(h, _ConsoleHandler)]:
        package.removeHandler(handler)
    package.addHandler(_ConsoleHandler())
    package.setLevel(level)
    package.propagate = False


def console_level() -> int:
    """Return the level of the package's messages in this process."""
    return logging.getLogger("lgssl_nnunet").getEffectiveLevel()
