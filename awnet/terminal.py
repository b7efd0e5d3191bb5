"""Standard output and standard error that never raise: text that cannot be written is dropped."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, Literal, cast

if TYPE_CHECKING:
    from rich.console import Console

Name = Literal["stdout", "stderr"]

_ASCII = str.maketrans(
    {"±": "+-", "−": "-", "–": "-", "—": "-", "…": "...", "×": "x", "·": "*", "→": "->", "≤": "<=", "≥": ">="}
)


class _Closed:
    """Replaces a standard stream that the process was started without."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


_CLOSED = _Closed()
_noted: weakref.WeakSet[Any] = weakref.WeakSet()  # streams whose failure was reported on standard error


class SafeStream:
    """A text stream that forwards everything to another stream and never raises.

    Characters that the other stream's encoding lacks are written in ASCII: signs as ``+-`` for ±, letters as
    escapes such as ``\\xe4``. If nothing can be written (a full disk, a pipe whose reader has exited, a
    closed terminal) the text is dropped, the first error is stored in ``error`` and reported once on standard
    error.

    Args:
        name: the stream of ``sys`` to write to, looked up at each write.
        stream: the stream to write to instead.
        note: whether to report on standard error that standard output failed.
    """

    def __init__(self, name: Name, stream: IO[str] | _Closed | None = None, *, note: bool = True) -> None:
        self.error: Exception | None = None
        self.note = note
        self._name, self._given = name, stream

    @property
    def _stream(self) -> Any:
        stream = self._given or getattr(sys, self._name) or _CLOSED
        # a live display of rich replaces the streams in sys by proxies that print through this stream again
        return getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        try:
            self._write(text)
        except RuntimeError:  # a signal handler prints during another print
            pass
        except (OSError, ValueError, AttributeError) as error:
            self._failed(error)
        return len(text)

    def _write(self, text: str) -> None:
        stream = self._stream
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding
            stream.write(text.translate(_ASCII).encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except RuntimeError:
            pass
        except (OSError, ValueError) as error:
            self._failed(error)

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    @property
    def rich_proxied_file(self) -> SafeStream:
        return self  # otherwise rich would use the other stream

    def __getattr__(self, name: str) -> Any:  # encoding, fileno, buffer …
        return getattr(self._stream, name)

    def _failed(self, error: Exception) -> None:
        if self.error is not None:
            return
        self.error = error
        stream = self._stream
        if stream in _noted:  # by another SafeStream
            return
        atexit.register(_drop_unwritten, stream)
        if self.note and self._name == "stdout":
            _noted.add(stream)
            with suppress(OSError, ValueError, AttributeError, RuntimeError):
                print(
                    f"awnet: note: standard output could not be written ({error}); the command continues "
                    "without it",
                    file=sys.stderr,
                    flush=True,
                )


def _drop_unwritten(stream: Any) -> None:
    """At exit: text that still cannot be written must not change the exit status to 120."""
    try:
        stream.flush()
    except (OSError, ValueError, AttributeError):
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def safe_output() -> Iterator[SafeStream]:
    """Makes ``sys.stdout`` and ``sys.stderr`` safe for a block of code; yields the first."""
    before = sys.stdout, sys.stderr
    out, err = SafeStream("stdout", before[0] or _CLOSED), SafeStream("stderr", before[1] or _CLOSED)
    sys.stdout, sys.stderr = cast("Any", out), cast("Any", err)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before


def safe_console(*, quiet: bool = False, soft_wrap: bool = False) -> Console:
    """A rich console on standard output that never raises if it cannot be written."""
    from rich.console import Console

    stream = cast("IO[str]", SafeStream("stdout"))
    return Console(file=stream, quiet=quiet, highlight=False, soft_wrap=soft_wrap)
