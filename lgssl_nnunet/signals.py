"""Taking signals over for the time of a block."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

INTERRUPTED = 130
"""Exit status of a process that Ctrl-C ended."""


@contextmanager
def handling(
    kinds: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[dict[signal.Signals, Any]]:
    """Let signals call `handler` within the block; outside the main thread, where that is impossible, change nothing.

    Args:
        kinds: the signals.
        handler: what Python calls with the signal's number and the frame.

    Yields:
        The handlers of before, by signal.
    """
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not the main thread
        for kind in kinds:
            before[kind] = signal.signal(kind, handler)
    try:
        yield before
    finally:
        for kind, previous in before.items():
            signal.signal(kind, previous)
