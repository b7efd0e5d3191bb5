"""The output of a run: ``log.jsonl``, TensorBoard and the terminal."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from awnet.files import expanded, flush
from awnet.terminal import safe_console
from awnet.text import visible

if TYPE_CHECKING:
    from io import RawIOBase

    from rich.progress import Progress, TaskID
    from torch.utils.tensorboard import SummaryWriter


SAY_EVERY_SECONDS = 60.0  # least time between lines within an epoch, if there is no progress bar


class RunLog:
    """Appends records to ``folder/log.jsonl`` and, with ``tensorboard``, to ``folder/tensorboard``.

    If the log cannot be written (a full disk), ``warn`` receives a line of text once, and the records are
    kept until there is room. TensorBoard's records are dropped.

    Args:
        folder: the run folder.
        resume_at: length of the log in bytes at the checkpoint that the run resumes from, or None. Later
            records are cut off, since the run writes them again.
        step: the step of that checkpoint; later records of TensorBoard are cut off.
        tensorboard: whether to write TensorBoard events.
        warn: receives lines of text.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_at: int | None = None,
        step: int = 0,
        tensorboard: bool = True,
        warn: Callable[[str], None],
    ) -> None:
        path = folder / "log.jsonl"
        mode = "r+b" if resume_at is not None and path.exists() else "wb"
        # without a buffer, so that the number of written bytes is known
        self.file = cast("RawIOBase", open(path, mode, buffering=0))  # noqa: SIM115 - close() closes it
        if resume_at is not None:
            size = self.file.seek(0, os.SEEK_END)
            self.file.truncate(min(size, resume_at))
        self._written = self.file.seek(0, os.SEEK_END)
        self._waiting = b""
        self._warn, self._warned = warn, False
        self._writer: SummaryWriter | None = None
        if tensorboard:
            self._open_tensorboard(folder, None if resume_at is None else step + 1)

    def _open_tensorboard(self, folder: Path, purge_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            path = str(folder / "tensorboard")
            self._writer = SummaryWriter(path, purge_step=purge_step, flush_secs=30)
        except Exception as error:
            self._warn(
                f"warning: TensorBoard's file could not be opened ({error}); the run continues without it"
            )

    def follow(self, folder: Path) -> None:
        """Continues in a renamed run folder; TensorBoard opens its file by name at each write."""
        if self._writer is not None:
            with suppress(Exception):
                self._writer.close()
            self._writer = None
            self._open_tensorboard(folder, None)

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record; numbers are also written to TensorBoard as ``kind/name`` at ``record["step"]``."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        self._waiting += line
        try:
            self._write_waiting()
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._warn(f"warning: the log could not be written ({error}); it waits for room on the disk")
        if self._writer is not None:
            try:
                for name, value in record.items():
                    if isinstance(value, int | float) and name not in ("step", "epoch"):
                        self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])
            except Exception as error:  # errors of TensorBoard's writer thread
                self._writer = None
                self._warn(f"warning: TensorBoard's file could not be written ({error}); it ends here")

    def _write_waiting(self) -> None:
        while self._waiting:
            count = self.file.write(self._waiting) or 0
            self._written += count
            self._waiting = self._waiting[count:]

    @property
    def length(self) -> int:
        """Length of the log in bytes, including records that are not written yet."""
        return self._written + len(self._waiting)

    def sync(self, length: int) -> None:
        """Flushes the first ``length`` bytes to the disk, from any thread; OSError if that fails."""
        if self._written < length:
            raise OSError(errno.ENOSPC, "the log waits for room on the disk")
        flush(self.file.fileno())

    def close(self) -> None:
        try:
            self._write_waiting()
        except OSError as error:
            self._warn(f"warning: the end of the log is lost ({error}); --resume writes it again")
        self.file.close()
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:
                self._warn(f"warning: TensorBoard's file could not be written ({error})")


def read_log(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's log.jsonl, of one kind ("step" or "epoch") if given.

    An incomplete last line, which a crash may leave, is ignored. Any other damage raises ValueError.
    """
    path = expanded(folder) / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: {folder} is not a run folder, or nothing was logged yet"
        )
    records = _parsed(path, path.read_bytes())
    return [record for record in records if kind is None or record["kind"] == kind]


def _parsed(path: Path, content: bytes) -> list[dict[str, Any]]:
    """The records of ``content``, whose last line may be incomplete."""
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(record, dict) or not {"kind", "step"} <= record.keys():
            raise ValueError(f"{path}, line {number}, is not a record of a run")
        records.append(record)
    return records


def check_log(folder: Path, state: dict[str, Any], warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """Checks that a run's log.jsonl belongs to the state that the run resumes from.

    Records after the state are ignored. If the log of an unfinished run is missing, ``warn`` receives a line
    of text, and a new log is started.

    Returns:
        The records of the epochs.

    Raises:
        FileNotFoundError: the run is finished and its log is missing.
        ValueError: the log is shorter than at the state, is damaged, or belongs to another run.
    """
    path = folder / "log.jsonl"
    if not path.is_file() and not state["finished"]:
        if state["log_bytes"]:
            warn(f"note: {path} is missing: a new one begins after step {state['step']}")
        return []
    if not path.is_file():
        read_log(folder)  # raises
    content = path.read_bytes()[: state["log_bytes"]]
    remedy = "put the log back, or move it away to resume with a new one"
    if len(content) < state["log_bytes"]:
        raise ValueError(
            f"{path} has {len(content):,} bytes, but had {state['log_bytes']:,} at the checkpoint of step "
            f"{state['step']}: {remedy}"
        )
    try:
        if content and not content.endswith(b"\n"):
            raise ValueError(f"{path} has no end of a line where the checkpoint of step {state['step']} was")
        records = _parsed(path, content)
        steps = [record["step"] for record in records]
        epochs = [record.get("epoch") for record in records if record["kind"] == "epoch"]
        if steps != sorted(steps) or (steps and steps[-1] > state["step"]):
            raise ValueError(f"{path} is not in the order of steps up to {state['step']}")
        if epochs != list(range(state["epoch"] + 1))[-len(epochs) or state["epoch"] + 1 :]:
            raise ValueError(
                f"{path} holds the epochs {epochs}, but {state['epoch']} were done at the checkpoint of step "
                f"{state['step']}"
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{error}: {remedy}") from error
    return [record for record in records if record["kind"] == "epoch"]


class Reporter:
    """Prints the progress of a run: a progress bar on a terminal, else one line per epoch and per minute.

    ``quiet`` prints nothing.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title = title
        self.console = safe_console(quiet=quiet, soft_wrap=True)
        self._steps = self._done = self._first = 0
        self._since = self._epoch_since = self._said = time.monotonic()
        self._images = 0
        self._losses = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def begin(self, steps: int, done: int) -> Reporter:
        """Starts at ``done`` of ``steps`` steps; use the result in a ``with`` statement."""
        self._steps, self._done, self._first = steps, done, done
        return self

    def __enter__(self) -> Reporter:
        if self.console.is_terminal and not self.console.quiet:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[status]}", markup=False),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(
                visible(self.title), total=self._steps, completed=self._done, status=""
            )
            self._bar.start()
        self._since = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        self._said = time.monotonic()
        self.console.print(visible(text), markup=False)

    def start_epoch(self) -> None:
        self._images, self._epoch_since = 0, time.monotonic()

    def step(self, done: int, epoch: str, images: int) -> None:
        """Call this after each step: ``images`` images were trained, ``done`` steps of the run are done."""
        self._done = done
        self._images += images
        if self._bar is not None and self._task is not None:
            status = f"epoch {epoch}  {self.pace():,.0f} images/s  {self.left()} left  {self._losses}"
            self._bar.update(self._task, completed=done, status=status)

    def pace(self) -> float:
        """Images per second in this session's part of the epoch."""
        return self._images / max(time.monotonic() - self._epoch_since, 1e-9)

    def losses(self, terms: dict[str, float]) -> str:
        """Stores the newest means of the terms of the loss and returns the main ones as text."""
        main = (name for name in ("total", "nat", "adv", "type") if name in terms)
        self._losses = "  ".join(f"{name} {terms[name]:.3f}" for name in main)
        return self._losses

    def pulse(self) -> None:
        """Prints a line within a long epoch, if there is no progress bar."""
        if self._bar is None and time.monotonic() - self._said > SAY_EVERY_SECONDS:
            self.say(
                f"{self.title}  step {self._done}/{self._steps}  {self._losses}  "
                f"{self.pace():,.0f} images/s  {self.left()} left"
            )

    def left(self) -> str:
        """Time left at the pace of this session, as ``m:ss`` or ``h:mm:ss``."""
        if self._done == self._first:
            return "–:––"
        pace = (time.monotonic() - self._since) / (self._done - self._first)
        seconds = round(pace * (self._steps - self._done))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
