"""SIGHUP and SIGUSR1 that arrive while a command prepares its training, which takes seconds.

They are noted, and training acts on them as soon as it has begun: it saves and stops.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: the signals by which a terminal that closes and a batch system ask a process to stop, where there are any
PATIENT = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))
_came: list[int] = []


def note(number: int, frame: Any) -> None:
    """The signal handler."""
    _came.append(number)


def take() -> int | None:
    """The first signal that was noted since the last call, None if there was none."""
    first = _came[0] if _came else None
    _came.clear()
    return first


@contextmanager
def noted() -> Iterator[None]:
    """Notes these signals in a block of code. Ignored ones stay ignored, and handlers of the program stay."""
    _came.clear()
    usual = {}
    if threading.current_thread() is threading.main_thread():
        for number in PATIENT:
            if signal.getsignal(number) == signal.SIG_DFL:
                usual[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
