"""Signals that ask a training run to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from awnet import early_signals
from awnet.training.logging import Reporter


class Stop(NamedTuple):
    """Why a run has to stop; false if it does not.

    signal: number of the signal, or 0.
    late: whether the deadline has passed.
    """

    signal: int = 0
    late: bool = False

    def __bool__(self) -> bool:
        return self.signal > 0 or self.late


class StopSignals:
    """A context in which signals that ask a process to stop are stored in ``received`` and do nothing else.

    A second SIGINT or SIGTERM takes effect at once. SIGHUP and SIGUSR1 never do, since a terminal that closes
    may send several, and batch systems use them as warnings. Signals that are ignored (SIGHUP under nohup,
    SIGINT in a background job of a shell) stay ignored, and the program's own handlers of SIGHUP and SIGUSR1
    stay. Outside the main thread no signal can be handled, so all keep their usual effect.
    """

    _IMMEDIATE = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, reporter: Reporter) -> None:
        self.received: int | None = None
        self._reporter = reporter
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (*self._IMMEDIATE, *early_signals.DEFERRED):
                handler = signal.getsignal(number)
                replaced = number in self._IMMEDIATE or handler in (signal.SIG_DFL, early_signals.record)
                if replaced and handler not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
            early = early_signals.take()
            if early is not None:
                self._handle(early, None)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            return
        self.received = number
        self._restore(self._IMMEDIATE)
        with suppress(RuntimeError):  # the signal interrupted another print
            self._reporter.say(
                f"{signal.Signals(number).name}: finishing the step and saving; a second Ctrl-C or SIGTERM "
                "stops at once, without saving"
            )

    def _restore(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number in self._previous:
                signal.signal(number, self._previous.pop(number))

    def __exit__(self, *error: object) -> None:
        self._restore(list(self._previous))
