"""SIGHUP and SIGUSR1 that arrive while a command prepares its training, which takes seconds.

They are recorded, and training handles them when it begins: it saves and stops.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: sent by a closing terminal and by batch systems before they stop a process; those that the system has
DEFERRED = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
_received: list[int] = []


def record(number: int, frame: Any) -> None:
    """The signal handler."""
    _received.append(number)


def take() -> int | None:
    """The first signal recorded since the last call, or None."""
    first = _received[0] if _received else None
    _received.clear()
    return first


@contextmanager
def recorded() -> Iterator[None]:
    """Records these signals for a block of code, except those that are ignored or have a handler."""
    _received.clear()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in DEFERRED:
            if signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, record)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
