"""Tracks a folder that is renamed or moved while files are written to it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows, which does not rename a folder that is in use
    fcntl = None  # type: ignore[assignment]

_F_GETPATH = 50  # of macOS


class RunFolder:
    """The current path of a folder, which is identified by device and inode. Use it in a ``with`` statement.

    Args:
        folder: an existing folder.
        warn: called with one line of text if the folder was renamed.
        work: what writes to the folder, for messages.
        again: what to do if the folder was moved, for the error message.
    """

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], None],
        work: str = "training",
        again: str = "resume it there with --resume (resume=True)",
    ) -> None:
        self._path, self._warn, self._work, self._again = folder, warn, work, again
        self._status = folder.stat()
        self._handle: int | None = None
        if fcntl is not None:
            self._handle = os.open(folder, os.O_RDONLY)

    @property
    def path(self) -> Path:
        """The current path of the folder.

        Raises:
            FileNotFoundError: the folder was deleted, or its new path cannot be found.
        """
        if not self._is_at(self._path):
            moved = self._current()
            if moved is None or not self._is_at(moved):
                raise FileNotFoundError(
                    f"the run folder {self._path} was deleted or moved away during {self._work}, so nothing "
                    f"more can be saved in it. If it is elsewhere, {self._again}"
                )
            self._warn(f"note: {self._path} was renamed during {self._work}; the run continues in {moved}")
            self._path = moved
        return self._path

    def during(self, write: Callable[[], object]) -> None:
        """Calls ``write``, and again if the folder was renamed during the call."""
        path = self.path
        try:
            write()
        except FileNotFoundError:
            if self.path == path:
                raise
        if self.path != path:
            write()

    def _is_at(self, path: Path) -> bool:
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(status, self._status)

    def _current(self) -> Path | None:
        """The path of the open folder according to the system, or None."""
        if self._handle is None:
            return None
        try:
            return Path(os.readlink(f"/proc/self/fd/{self._handle}"))
        except OSError:
            pass
        try:
            name: bytes = fcntl.fcntl(self._handle, _F_GETPATH, bytes(1024))
        except OSError:
            return None
        return Path(os.fsdecode(name.rstrip(b"\0")))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
