"""The files of an evaluation, replaced together or not at all, and checked when they are read.

A new set of files is written into ``.building``, with ``manifest.json``, their SHA-256, as the last one. The
new set counts from the moment in which that folder is renamed to ``.pending``. Its files then move into place
one by one, the manifest last. A reader, meanwhile or after a kill, takes each file from ``.pending`` if it is
still there; the next writer finishes the moves. ``report.json`` is the first old file to be removed and the
last new one to be moved, so that who reads single files does not find it beside files of another evaluation.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from awnet import files
from awnet.files import read_json, write_json

REPORT, MANIFEST = "report.json", "manifest.json"
_PENDING, _BUILDING, _LOCK = ".pending", ".building", ".evaluation.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """``folder`` for this evaluation alone, for a block of code; it is made where it is missing.

    The lock is the system's: a killed process leaves none behind.

    Raises:
        BlockingIOError: another evaluation holds it; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK

    def busy() -> str:
        holder = ""
        with suppress(OSError, UnicodeDecodeError):
            holder = path.read_text(encoding="utf-8").strip()
        return (
            f"another process evaluates in {folder}{holder and f' ({holder})'}: wait for it, stop it, or "
            "choose another name for this evaluation (--name, name=)"
        )

    with files.locked(path, busy):
        with suppress(OSError):  # on Windows nothing can be written to a locked file
            since = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            path.write_text(f"process {os.getpid()} on {platform.node()}, since {since}\n", encoding="utf-8")
        try:
            yield
        finally:
            with suppress(OSError):
                path.write_text("", encoding="utf-8")


@contextmanager
def replaced_together(folder: Path, known: Iterable[str]) -> Iterator[Path]:
    """Yields an empty folder to write files into; on success they replace an earlier set in ``folder``.

    Files of the earlier set that the new one lacks are removed: those of its manifest, or without a manifest
    those in ``known``. Any other file in ``folder`` stays. On an exception nothing changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder, known)
    building = folder / _BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        names = sorted(path.name for path in building.iterdir())
        for name in names:
            _flush(building / name)
        write_json(building / MANIFEST, {"sha256": {name: _checksum(building / name) for name in names}})
        os.rename(building, folder / _PENDING)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _flush(folder)
    _finish(folder, known)


def _finish(folder: Path, known: Iterable[str]) -> None:
    """Moves a set that counts already into place."""
    pending = folder / _PENDING
    if not pending.is_dir():
        return
    new = _checksums(pending)
    if new is not None:  # else the manifest, the last file, was moved
        old = _checksums(folder)
        if (pending / REPORT).exists():
            (folder / REPORT).unlink(missing_ok=True)
        for name in {*known} if old is None else {*old}:
            if name not in new:
                (folder / name).unlink(missing_ok=True)
        for name in sorted(new, key=lambda name: name == REPORT):
            if (pending / name).exists():
                os.replace(pending / name, folder / name)
        os.replace(pending / MANIFEST, folder / MANIFEST)
        _flush(folder)
    pending.rmdir()


def read_together(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of those of ``names`` that belong to the set of files in ``folder``, all of one set.

    Without a manifest (a set written by an earlier version) nothing is verified.

    Raises:
        ValueError: a file is missing, or is not the one that was written with the others.
    """
    names = list(names)
    for _ in range(10):
        checksums = _current(folder)
        found = {}
        fault = ""
        for name in names if checksums is None else [name for name in names if name in checksums]:
            data = _read(folder, name)
            if checksums is not None and (data is None or _sha256(data) != checksums[name]):
                fault = f"{folder / name} is " + ("missing" if data is None else "damaged or was changed")
                break
            if data is not None:
                found[name] = data
        if not fault and _current(folder) == checksums:
            return found
        if fault and _current(folder) == checksums:
            raise ValueError(f"{fault}: it is not the file that its evaluation wrote; evaluate again")
    raise ValueError(f"{folder} changes all the time: another process writes there")


def _current(folder: Path) -> dict[str, str] | None:
    found = _checksums(folder / _PENDING)
    return _checksums(folder) if found is None else found


def _checksums(folder: Path) -> dict[str, str] | None:
    """What the manifest says; None where there is none."""
    try:
        found: Any = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("sha256"), dict):
        raise ValueError(f"{folder / MANIFEST} is damaged; evaluate again")
    return found["sha256"]


def _read(folder: Path, name: str) -> bytes | None:
    for place in (folder / _PENDING, folder):  # files move from the first to the second
        with suppress(FileNotFoundError, NotADirectoryError):
            return (place / name).read_bytes()
    return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """A file, or a folder's entries, to the disk."""
    with suppress(PermissionError):  # a folder on Windows
        handle = os.open(path, os.O_RDONLY)
        try:
            files.flush(handle)
        finally:
            os.close(handle)


def link(target: Path, path: Path) -> None:
    """Makes ``path`` a relative symbolic link to ``target``; a copy of it where there are no links."""
    relative = os.path.relpath(target, path.parent)
    if path.is_symlink() and os.readlink(path) == relative:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.symlink(relative, temporary)
        os.replace(temporary, path)
    except OSError:
        write_json(path, read_json(target))
