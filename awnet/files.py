"""Paths, files that are written atomically, and locks, on every supported system."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None  # type: ignore[assignment]

_TEMPORARY = re.compile(
    r"\..+\.tmp|\.tmp\w{6}"
)  # the second is what a killed save_file of safetensors leaves
_LOCK = "lock"  # in a temporary folder; its writer holds a lock on it
_NAME_BYTES = 100  # of the target's name in a temporary one; some file systems allow 143 bytes in all
_ABANDONED_SECONDS = 24 * 3600.0  # age of a leftover on a file system without locks

# What file systems without an operation answer (FAT, SMB, some FUSE): not a sign that data is lost.
_UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EACCES,
    errno.EBADF,
    errno.EISDIR,
    errno.ENOTTY,
}


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with a leading ``~`` or ``~user`` replaced by that home folder.

    Raises:
        ValueError: there is no such user, the user has no home folder, or ``path`` has a null byte.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r} is not a path: it contains a null byte")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            f"{path} cannot be expanded: the home folder of {path.parts[0]!r} is not known. For a folder "
            "whose own name begins with ~, write the absolute path"
        ) from None


def make_folder(path: Path) -> Path:
    """``path``, made with the folders above it where they are missing.

    Raises:
        NotADirectoryError: it, or a path above it, is a file.
        OSError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(p for p in (path, *path.parents) if p.exists() and not p.is_dir())
        raise NotADirectoryError(f"{path} must be a folder, but {file} is a file") from None
    return path


# Locks


@contextmanager
def locked(
    path: str | Path, busy: Callable[[], str], warn: Callable[[str], None] | None = None
) -> Iterator[bool]:
    """Holds an exclusive lock on the file ``path`` for a block of code; the file is created if missing.

    The operating system releases the lock when the process ends, however it ends. Yields whether the lock is
    held: False on a file system without locks, which is told to ``warn``.

    Args:
        path: the lock file; its folder must exist.
        busy: makes the error message when another process, or another block in this one, holds the lock.
        warn: receives a line of text.

    Raises:
        BlockingIOError: the lock is held elsewhere.
    """
    handle = None
    try:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _lock(handle)
            held = True
        except BlockingIOError:
            raise BlockingIOError(errno.EAGAIN, busy()) from None
        except OSError as error:
            held = False
            if warn is not None:
                folder = Path(path).parent
                warn(f"note: {folder} could not be locked ({error}): start no second process in it")
        yield held
    finally:
        if handle is not None:
            os.close(handle)


def _lock(handle: int) -> None:
    """Without waiting. BlockingIOError: it is held elsewhere; another OSError: there are no locks."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the content: it cannot be used while it is locked
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except OSError as error:
            raise BlockingIOError(errno.EAGAIN, str(error)) from None
    else:
        raise OSError(errno.ENOLCK, "no locks on this system")


# Files that are written atomically


@contextmanager
def written_atomically(path: str | Path, *, parents: bool = True) -> Iterator[Path]:
    """Yields a temporary path to write to; on success flushes it to disk and renames it to ``path``.

    A reader sees the old file or the new one, never a part of either. On an exception (a full disk, say) the
    temporary file is removed and the old file stays. An existing file keeps its permissions, and a symbolic
    link stays one: the file that it points to is replaced. A device or a pipe, such as ``/dev/null``, stays
    as well and receives the bytes.

    The temporary file is in a folder beside ``path`` that is locked while the block runs, so that ``sweep``
    can tell what a killed process left behind; leftovers for the same ``path`` are removed here. ``parents``:
    make the folders above ``path`` where they are missing.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        ValueError: ``path`` begins with ``~`` and an unknown user.
        OSError: the file cannot be written.
    """
    path = expanded(path)
    try:
        existing = path.stat()
    except FileNotFoundError:
        existing = None
    if existing is not None and stat.S_ISDIR(existing.st_mode):
        raise IsADirectoryError(errno.EISDIR, "a file cannot replace a folder", str(path))
    if existing is not None and (not stat.S_ISREG(existing.st_mode) or _is_open_file(path)):
        with _copied_into(path) as temporary:
            yield temporary
        return
    path = Path(os.path.realpath(path))
    if parents:
        path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path) as folder:
        temporary = folder / "file"
        temporary.touch(0o666 if existing is None else 0o600 | stat.S_IMODE(existing.st_mode))
        attributes = existing or temporary.stat()
        yield temporary
        with open(temporary, "rb+") as file:
            flush(file.fileno())
        _set_permissions(temporary, attributes)
        os.replace(temporary, path)
    _flush_folder(path.parent)


def _set_permissions(path: Path, attributes: os.stat_result) -> None:
    """Owner and mode, as far as the file system has them and the user may set them."""
    now = path.stat()
    with suppress(OSError):
        if (now.st_uid, now.st_gid) != (attributes.st_uid, attributes.st_gid):  # root writes a user's file
            os.chown(path, attributes.st_uid, attributes.st_gid)
    with suppress(OSError):
        if stat.S_IMODE(now.st_mode) != stat.S_IMODE(attributes.st_mode):
            os.chmod(path, stat.S_IMODE(attributes.st_mode))


def _is_open_file(path: Path) -> bool:
    """Whether ``path`` names a file that a process has open, as ``/dev/stdout`` does."""
    folder = Path(os.path.realpath(path.parent))
    return folder == Path("/dev") or folder.is_relative_to("/proc")


@contextmanager
def _copied_into(path: Path) -> Iterator[Path]:
    """A temporary file elsewhere, because most writers need to seek; its bytes go into ``path``."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "file"
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as source, open(path, "wb") as sink:
            shutil.copyfileobj(source, sink)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for a block of code, which only this user can read.

    It is locked meanwhile, so that a later call for the same ``path``, or ``sweep``, can tell whether a
    killed process left it behind. Leftovers for the same ``path`` are removed.
    """
    sweep_beside(path)
    folder, handle = _locked_folder(path)
    try:
        yield folder
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    """A new folder, and the open file whose lock shows that its writer lives (None: no locks here)."""
    while True:
        folder = path.with_name(f"{_stem(path)}{secrets.token_hex(4)}.tmp")
        handle = None
        try:
            folder.mkdir(0o700)
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            _lock(handle)
            if (folder / _LOCK).exists():  # else another process has just swept it
                return folder, handle
        except FileExistsError:
            continue
        except BlockingIOError:  # another process is just sweeping it
            pass
        except OSError:
            if handle is None:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder, handle
        if handle is not None:
            os.close(handle)


def _stem(path: Path) -> str:
    """What the names of the temporary folders for ``path`` begin with."""
    return f".{os.fsencode(path.name)[:_NAME_BYTES].decode('utf-8', 'ignore')}."


def is_temporary(path: Path) -> bool:
    """Whether it is on its way by ``written_atomically``, or what a killed process left of that."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: str | Path) -> None:
    """Removes from ``folder`` and the folders in it the temporary files that killed processes have left.

    Those of running processes stay: they hold a lock. On a file system without locks only what has not
    changed for a day is removed. Nothing is raised for what cannot be read or removed.
    """
    for place, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not is_temporary(Path(name))]
        _sweep(Path(place))


def sweep_beside(path: Path) -> None:
    """As ``sweep``, but only what was on its way to ``path``."""
    _sweep(path.parent, re.compile(re.escape(_stem(path)) + r"\w{8}\.tmp"))


def _sweep(folder: Path, names: re.Pattern[str] = _TEMPORARY) -> None:
    with suppress(OSError):
        for name in os.listdir(folder):
            if names.fullmatch(name):
                with suppress(OSError):
                    _remove_if_abandoned(folder / name)


def _remove_if_abandoned(path: Path) -> None:
    inner = path if not path.is_dir() or path.is_symlink() else path / _LOCK
    try:
        handle = os.open(inner, os.O_RDWR)
    except FileNotFoundError:  # a folder that is just being made or removed, or that never got its lock
        if time.time() - path.lstat().st_mtime > 60:
            shutil.rmtree(path)
        return
    try:
        try:
            _lock(handle)
        except BlockingIOError:
            return
        except OSError:
            if time.time() - inner.stat().st_mtime < _ABANDONED_SECONDS:
                return
        with suppress(PermissionError):  # Windows removes no open file
            _remove(path)  # while the lock is held: a writer that has just made the folder may not take it
    finally:
        os.close(handle)
    if os.path.lexists(path):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def flush(handle: int) -> None:
    """Writes an open file to the disk, as far as its file system can.

    Raises:
        OSError: data could not be written (no room, a broken disk).
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _flush_folder(folder: Path) -> None:
    """So that a rename in it survives a crash of the machine."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows, or a folder that may be written but not read
        return
    try:
        flush(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str, *, parents: bool = True) -> None:
    """Writes ``text`` as UTF-8, atomically; what UTF-8 cannot hold (part of a file name) is escaped."""
    with written_atomically(path, parents=parents) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically; NaN and infinities are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; a damaged one raises ValueError with its path."""
    try:
        return json.loads(expanded(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of numbers too long and lists too deep to be read
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
