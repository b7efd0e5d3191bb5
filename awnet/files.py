"""Paths, atomic file writes and file locks on all supported systems."""

from __future__ import annotations

import errno
import hashlib
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

_TEMPORARY = re.compile(r"\..+\.tmp|\.tmp\w{6}")  # the second: left by a killed save_file of safetensors
_LOCK = "lock"  # the file in a temporary folder on which its writer holds a lock
_NAME_BYTES = 100  # of the target's name in the temporary name; some file systems limit names to 143 bytes
_ABANDONED_SECONDS = 24 * 3600.0  # age of a leftover on a file system without locks

# Errors for operations that a file system does not support (FAT, SMB, some FUSE). No data is lost.
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
            f"{path} cannot be expanded: the home folder of {path.parts[0]!r} is not known. If the folder's "
            "name begins with ~, use the absolute path"
        ) from None


def cache_folder(name: str) -> Path:
    """The folder ``name`` in awnet's cache folder, which may not exist.

    That is ``AWNET_CACHE``, or ``awnet`` in ``XDG_CACHE_HOME`` or ``~/.cache``. Raises RuntimeError if the
    user has no home folder.
    """
    given = os.environ.get("AWNET_CACHE")
    if given:
        return expanded(given) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "awnet" / name


def make_folder(path: Path) -> Path:
    """Creates the folder ``path`` and missing parents; returns ``path``.

    Raises:
        NotADirectoryError: ``path`` or one of its parents is a file.
        OSError: the folder cannot be created.
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

    The operating system releases the lock when the process ends, also if it is killed. Yields whether the
    lock is held; on a file system without locks it yields False and calls ``warn``.

    Args:
        path: the lock file; its folder must exist.
        busy: returns the error message if another process, or another block in this one, holds the lock.
        warn: called with one line of text.

    Raises:
        BlockingIOError: another holder has the lock.
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
    """Locks without waiting. BlockingIOError: another holder has it; other OSError: no support for locks."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond the content, since a locked range cannot be read
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

    A reader sees either the old file or the new one. On an exception (for example a full disk) the temporary
    file is removed and the old file is unchanged. An existing file keeps its permissions. If ``path`` is a
    symbolic link, the file that it points to is replaced. A device or pipe, such as ``/dev/null``, receives
    the bytes.

    The temporary file is in a folder next to ``path`` that is locked while the block runs, so that ``sweep``
    can recognize the files of killed processes. Such files for the same ``path`` are removed first.

    Args:
        path: the file to write.
        parents: whether to create missing parent folders.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        ValueError: ``path`` begins with ``~`` and names an unknown user.
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
        flush_path(temporary)
        _set_permissions(temporary, attributes)
        os.replace(temporary, path)
    flush_path(path.parent)


def _set_permissions(path: Path, attributes: os.stat_result) -> None:
    """Sets owner and mode if the file system supports them and the user may set them."""
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
    """Yields a temporary file elsewhere, because most writers seek; then copies its bytes to ``path``."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder) / "file"
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as source, open(path, "wb") as sink:
            shutil.copyfileobj(source, sink)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields a folder next to ``path`` that only this user can read; removes it after the block.

    The folder is locked during the block. A later call for the same ``path``, or ``sweep``, removes folders
    that are not locked: killed processes left them.
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
    """A new folder, and the open file that is locked while its writer runs (None without locks)."""
    while True:
        folder = path.with_name(f"{_stem(path)}{secrets.token_hex(4)}.tmp")
        handle = None
        try:
            folder.mkdir(0o700)
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            _lock(handle)
            if (folder / _LOCK).exists():  # otherwise another process has just removed it
                return folder, handle
        except FileExistsError:
            continue
        except BlockingIOError:  # another process is removing it
            pass
        except OSError:
            if handle is None:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder, handle
        if handle is not None:
            os.close(handle)


def _stem(path: Path) -> str:
    """The prefix of the names of temporary folders for ``path``."""
    return f".{os.fsencode(path.name)[:_NAME_BYTES].decode('utf-8', 'ignore')}."


def is_temporary(path: Path) -> bool:
    """Whether ``path`` has the name of a temporary file or folder of ``written_atomically``."""
    return _TEMPORARY.fullmatch(path.name) is not None


def sweep(folder: str | Path) -> None:
    """Removes temporary files that killed processes left in ``folder`` and its subfolders.

    Files of running processes are kept, because they are locked. On a file system without locks only files
    unchanged for a day are removed. Files that cannot be read or removed are skipped.
    """
    for place, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not is_temporary(Path(name))]
        _sweep(Path(place))


def sweep_beside(path: Path) -> None:
    """As ``sweep``, but only temporary files for ``path``."""
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
    except FileNotFoundError:  # being created or removed, or its writer was killed before the lock
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
        with suppress(PermissionError):  # Windows does not remove open files
            _remove(path)  # with the lock held, so that the writer of a new folder cannot take it
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
    """Flushes an open file to disk, if its file system supports this.

    Raises:
        OSError: data could not be written (full or broken disk).
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def flush_path(path: Path) -> None:
    """As ``flush``, for a file or for the entries of a folder, so that a rename survives a crash."""
    folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except OSError:
        if folder:  # on Windows, or without read permission
            return
        raise
    try:
        flush(handle)
    finally:
        os.close(handle)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's contents, in hex as ``sha256sum`` prints it; the file is read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str | Path, text: str, *, parents: bool = True) -> None:
    """Writes ``text`` as UTF-8, atomically; what UTF-8 cannot encode (in file names) is escaped."""
    with written_atomically(path, parents=parents) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically; ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Reads a JSON file; ValueError with its path if it is damaged."""
    try:
        return json.loads(expanded(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: lists nested too deeply
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
