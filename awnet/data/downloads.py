"""Finds the published data sets on disk, or downloads their archives and verifies the checksums."""

from __future__ import annotations

import os
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from awnet.files import expanded, locked, make_folder, sweep_beside, temporary_folder

CHUNK = 1 << 20
MOST_BYTES = 300_000_000  # larger than every published archive

Progress = Callable[[int, int | None], None]  # (bytes so far, total bytes if the server reports it)


@dataclass(frozen=True)
class Archive:
    """url: where it is published. checksum: in pooch's format. folder: the folder that it contains."""

    url: str
    checksum: str
    folder: str


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "md5:c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "md5:eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
    ),
    "tiny_imagenet": Archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "md5:90528d7ca1a48142e341f4ef8d21d0de",
        "tiny-imagenet-200",
    ),
}


def find_folder(name: str, data_dir: str | Path, markers: dict[str, str]) -> tuple[Path, str]:
    """Finds the published folder of data set ``name``; returns it and its marker file.

    ``data_dir`` is the folder itself, under any name, or its parent. ``markers``: folder name → a file that
    only this version has; the first existing one is taken. Raises FileNotFoundError if there is none.
    """
    data_dir = expanded(data_dir)
    for folder, marker in markers.items():
        for candidate in (data_dir / folder, data_dir):
            if (candidate / marker).is_file():
                return candidate, marker
    expected = " or ".join(f"{folder} (with {marker})" for folder, marker in markers.items())
    state = "" if data_dir.is_dir() else ", and that folder does not exist"
    raise FileNotFoundError(
        f"{name} is not in data_dir {str(data_dir)!r}{state}. Expected the published folder {expected}, "
        f"there or directly under it. Give its path with --data-dir (data_dir=…), or download it with "
        f"`awnet data download {name} --data-dir {data_dir}`"
    )


def download(
    name: str, data_dir: str | Path = "data", *, url: str | None = None, progress: Progress | None = None
) -> Path:
    """Downloads the published folder of data set ``name`` into ``data_dir`` and returns its path.

    An existing folder is not changed. The archive is kept next to it; an interrupted download resumes if the
    server supports it. ``url`` names a mirror, whose file must have the publisher's checksum. ``progress`` is
    called as data arrives.

    Raises:
        ValueError: the name is unknown, the checksum is wrong, the archive has unexpected content, or the
            server sends more than the archive's size.
        ConnectionError: the archive cannot be downloaded.
    """
    import pooch
    from pooch.hashes import hash_matches

    if name == "digits":
        raise ValueError("digits needs no download: it ships inside scikit-learn")
    if name not in ARCHIVES:
        raise ValueError(f"unknown data set {name!r}; available are {', '.join(ARCHIVES)}")
    if url is not None and not url.startswith(("http://", "https://", "ftp://")):
        raise ValueError(f"url must begin with http://, https:// or ftp://, got {url!r}")
    archive = ARCHIVES[name]
    data_dir = expanded(data_dir)
    folder, packed = data_dir / archive.folder, data_dir / Path(archive.url).name
    for path in (folder, packed):  # what a killed download left behind
        sweep_beside(path)
    if folder.is_dir():
        return folder
    make_folder(data_dir)

    def fetch(address: str, output: Any, _: Any) -> None:
        try:
            _fetch(address, Path(output), packed.with_name(f"{packed.name}.part"), progress)
        except (OSError, HTTPException) as error:
            raise ConnectionError(
                f"{address} could not be downloaded: {error}. The partial download is kept; the same command "
                f"resumes it. Without a network, copy the published folder {archive.folder} into "
                f"{data_dir} by other means, or give its path with --data-dir (data_dir=…)"
            ) from error

    pooch.get_logger().setLevel("WARNING")
    options = {"known_hash": archive.checksum, "fname": packed.name, "downloader": fetch}
    if not packed.is_file() or not hash_matches(packed, archive.checksum):
        with temporary_folder(packed) as scratch:
            os.replace(pooch.retrieve(url or archive.url, path=scratch, **options), packed)
    with temporary_folder(folder) as scratch:
        _unpack(scratch, packed, folder)
    return folder


def _fetch(url: str, output: Path, part: Path, progress: Progress | None) -> None:
    """Completes ``part`` from ``url``, then moves it to ``output``; ValueError beyond MOST_BYTES."""
    try:
        with locked(part, lambda: "another process is downloading it; wait until it has finished"):
            _complete(url, part, progress)
        os.replace(part, output)
    finally:
        if part.is_file() and not part.stat().st_size:
            part.unlink()


def _complete(url: str, part: Path, progress: Progress | None) -> None:
    received = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={received}-"} if received else {})
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: the file is complete; then the checksum decides
            raise
        return
    with reply:
        resumed = reply.status == 206
        received = received if resumed else 0
        length = reply.headers.get("Content-Length")
        total = received + int(length) if length and length.isdecimal() else None
        if total is not None and total > MOST_BYTES:
            raise _too_large(url, part, f"offers {total:,} bytes")
        with part.open("ab" if resumed else "wb") as file:
            while chunk := reply.read(CHUNK):
                received += len(chunk)
                if received > MOST_BYTES:
                    raise _too_large(url, part, f"sent more than {MOST_BYTES:,} bytes")
                file.write(chunk)
                if progress is not None:
                    progress(received, total)
    if total is not None and received != total:
        raise OSError(f"the connection was lost after {received:,} of {total:,} bytes")


def _too_large(url: str, part: Path, reason: str) -> ValueError:
    part.unlink(missing_ok=True)
    return ValueError(
        f"{url} {reason}, but no published archive has more than {MOST_BYTES:,}: this is another file. Give "
        "another mirror with --url (url=…)"
    )


def _unpack(scratch: Path, archive: Path, folder: Path) -> None:
    """Extracts the folder in ``archive`` to ``folder``, atomically, by way of the folder ``scratch``."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                for info in opened.infolist():
                    _check_member(archive, info.filename, folder.name)
                opened.extractall(scratch)
        else:
            with tarfile.open(archive) as tar:
                for member in tar:
                    _check_member(archive, member.name, folder.name)
                tar.extractall(scratch, filter="data")
        if not (scratch / folder.name).is_dir():
            raise ValueError(f"{archive} does not hold the folder {folder.name}")
        os.rename(scratch / folder.name, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{archive} could not be unpacked: {error}") from error


def _check_member(archive: Path, name: str, folder: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if parts[0] != folder or ".." in parts:
        raise ValueError(f"{archive} holds {name!r}, outside its folder {folder}, so it is not unpacked")
