"""Ending a training between two steps: because a signal came, or because a file named STOP appeared."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from lgssl_nnunet.engine.distributed import is_launched
from lgssl_nnunet.signals import handling

STOP_FILE = "STOP"
# What a terminal, a cluster that wants its node back, and a cluster that warns before its time limit send.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """Remembers that the run is to end, so that the loop can end after the step that it is in.

    As a context manager it takes the signals over and gives them back. A second Ctrl-C has its usual effect, to
    interrupt at once; what clusters may send twice stays remembered, and so does Ctrl-C in one of several processes,
    which gets it from the terminal and from its launcher. Outside the main thread signals cannot be taken over and only
    the file counts.

    Args:
        folder: the fold folder, in which a file named STOP ends the run.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / STOP_FILE
        self.received: str | None = None
        self._taken_over = ExitStack()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = self._taken_over.enter_context(handling(SIGNALS, self._remember))
        return self

    def __exit__(self, *exception: object) -> None:
        self._taken_over.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        self.received = kind.name
        if kind is signal.SIGINT and not is_launched():
            signal.signal(kind, self._before[kind])

    @property
    def reason(self) -> str | None:
        """What asks for the end, None if nothing does."""
        return self.received or (self._file_in_words if self.file.exists() else None)

    def is_file(self, reason: str) -> bool:
        """Whether a reason, of this process or another, is the file and not a signal."""
        return reason == self._file_in_words

    @property
    def _file_in_words(self) -> str:
        return f"the file {self.file}"
