"""Progress of an evaluation: a bar on a terminal, a line per minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from awnet.terminal import safe_console
from awnet.text import visible

Advance = Callable[[str, int], None]
"""Called with what runs now and the number of steps that were completed since the last call."""

HEARTBEAT_SECONDS = 60.0


@contextmanager
def progress_bar(show: bool, total: int) -> Iterator[Advance]:
    """Yields a function that reports progress; it does nothing unless ``show``.

    Without a terminal it prints a line per minute, so that a log shows that the evaluation still runs.
    """
    if not show:
        yield lambda kind, by: None
        return
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        yield _heartbeat(console, total)
        return

    columns = (
        TextColumn("evaluate {task.description:<14}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=safe_console(), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda kind, by: bar.update(task, advance=by, description=visible(kind))


def _heartbeat(console: Console, total: int) -> Advance:
    """Prints what runs and how far it is, at most once per :data:`HEARTBEAT_SECONDS`."""
    start = last = time.monotonic()
    done = 0

    def advance(kind: str, by: int) -> None:
        nonlocal last, done
        done += by
        now = time.monotonic()
        if now - last >= HEARTBEAT_SECONDS:
            last = now
            console.print(f"evaluate: {kind}, {done} of {total} batches, {now - start:.0f} s", markup=False)

    return advance
