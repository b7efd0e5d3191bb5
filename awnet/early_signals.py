"""SIGHUP and SIGUSR1 that arrive while a command prepares its training, which takes seconds.

They are recorded, and training handles them when it begins: it saves and stops.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: the signals by which a closing terminal and a batch system ask a process to stop, if the system has them
PATIENT = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
_received: list[int] = []


def note(number: int, frame: Any) -> None:
    """The signal handler."""
    _received.append(number)


def take() -> int | None:
    """The first signal that was recorded since the last call; None if there was none."""
    first = _received[0] if _received else None
    _received.clear()
    return first


@contextmanager
def noted() -> Iterator[None]:
    """Records these signals for a block of code; ignored ones stay ignored, and other handlers stay."""
    _received.clear()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in PATIENT:
            if signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
