"""A folder that is followed when it is renamed or moved while files are written to it."""

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
    """Where a folder is now, known by its identity rather than by its name. Use it in a ``with`` statement.

    Args:
        folder: an existing folder.
        warn: receives a line of text when the folder was renamed.
        work: what writes to the folder, for messages.
        again: how to continue the work after the folder was deleted, for the error message.
    """

    def __init__(
        self,
        folder: Path,
        warn: Callable[[str], None],
        work: str = "training",
        again: str = "resume it there with --resume (resume=True)",
    ) -> None:
        self._path, self._warn, self._work, self._again = folder, warn, work, again
        self._found = folder.stat()
        self._handle: int | None = None
        if fcntl is not None:
            self._handle = os.open(folder, os.O_RDONLY)

    @property
    def path(self) -> Path:
        """The folder's path: the one that was given as long as it is right.

        Raises:
            FileNotFoundError: the folder was deleted, or moved to where it cannot be found.
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
        """Calls ``write``, and once more where the folder was renamed meanwhile."""
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
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(found, self._found)

    def _current(self) -> Path | None:
        """By the system's knowledge of the open folder; None where it has none."""
        if self._handle is None:
            return None
        try:
            return Path(os.readlink(f"/proc/self/fd/{self._handle}"))
        except OSError:
            pass
        try:
            found: bytes = fcntl.fcntl(self._handle, _F_GETPATH, bytes(1024))
        except OSError:
            return None
        return Path(os.fsdecode(found.rstrip(b"\0")))

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
