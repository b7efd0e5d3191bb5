"""The files of an evaluation, replaced atomically as a set, with their checksums verified on every read.

A new set of files is written into ``.building``, followed by ``manifest.json`` with the SHA-256 of each file.
Renaming that folder to ``.pending`` makes the new set valid. Its files are then moved into place one by one,
the manifest last. A reader, during the moves or after a kill, takes each file from ``.pending`` if it is
still there; the next writer finishes the moves. ``report.json`` is the first old file to be removed and the
last new file to be moved, so that programs that read single files never see it next to files of another
evaluation.
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
from awnet.files import flush_path, read_json, sha256, write_json

REPORT, MANIFEST = "report.json", "manifest.json"
_PENDING, _BUILDING, _LOCK = ".pending", ".building", ".evaluation.lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks ``folder`` for this evaluation for a block of code; the folder is created if needed.

    It is a lock of the operating system: it is released when the process is killed.

    Raises:
        BlockingIOError: another evaluation holds the lock; the message says which.
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
        with suppress(OSError):  # on Windows a locked file cannot be written
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

    Files of the earlier set that the new one lacks are removed: those in its manifest, or those in ``known``
    if there is no manifest. Other files in ``folder`` are kept. After an exception nothing has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finish_evaluation(folder, known)
    building = folder / _BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
        names = sorted(path.name for path in building.iterdir())
        for name in names:
            flush_path(building / name)
        write_json(building / MANIFEST, {"sha256": {name: sha256(building / name) for name in names}})
        os.rename(building, folder / _PENDING)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    flush_path(folder)
    finish_evaluation(folder, known)


def finish_evaluation(folder: Path, known: Iterable[str]) -> None:
    """Moves the files of a valid new set into place."""
    pending = folder / _PENDING
    if not pending.is_dir():
        return
    new = _checksums(pending)
    if new is not None:  # otherwise the manifest, the last file, was moved already
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
        flush_path(folder)
    pending.rmdir()


def read_together(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The contents of the files ``names`` that the set in ``folder`` has, all from the same set, verified.

    Without a manifest (a set written by an earlier version) nothing is verified.

    Raises:
        ValueError: a file is missing, or its checksum differs from the manifest.
    """
    names = list(names)
    for _ in range(10):
        checksums = _current(folder)
        contents = {}
        fault = ""
        for name in names if checksums is None else [name for name in names if name in checksums]:
            data = _read(folder, name)
            if checksums is not None and (
                data is None or hashlib.sha256(data).hexdigest() != checksums[name]
            ):
                fault = f"{folder / name} is " + ("missing" if data is None else "damaged or was changed")
                break
            if data is not None:
                contents[name] = data
        if not fault and _current(folder) == checksums:
            return contents
        if fault and _current(folder) == checksums:
            raise ValueError(f"{fault}: it is not the file that its evaluation wrote; evaluate again")
    raise ValueError(f"{folder} keeps changing: another process writes to it")


def _current(folder: Path) -> dict[str, str] | None:
    pending = _checksums(folder / _PENDING)
    return _checksums(folder) if pending is None else pending


def _checksums(folder: Path) -> dict[str, str] | None:
    """The checksums in the manifest; None if there is no manifest."""
    try:
        manifest: Any = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("sha256"), dict):
        raise ValueError(f"{folder / MANIFEST} is damaged; evaluate again")
    return manifest["sha256"]


def _read(folder: Path, name: str) -> bytes | None:
    for place in (folder / _PENDING, folder):  # files move from the first to the second
        with suppress(FileNotFoundError, NotADirectoryError):
            return (place / name).read_bytes()
    return None


def link(target: Path, path: Path) -> None:
    """Makes ``path`` a relative symbolic link to ``target``, or a copy if links are not supported."""
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
