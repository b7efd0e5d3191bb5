"""The versions, the device and the git commit that a result was computed with."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from awnet._version import __version__

_ROOT = Path(__file__).resolve().parents[1]


class Commit(NamedTuple):
    """The commit of the package's git checkout; both fields are None if the package is not in a checkout.

    hash: the full hash.
    modified: whether tracked files differ from the commit.
    """

    hash: str | None
    modified: bool | None


def git_commit(ignore: Sequence[str] = (), root: Path = _ROOT) -> Commit:
    """The commit of the git checkout at ``root``, by default the package's.

    For the package, the environment variable ``AWNET_COMMIT`` replaces what git says: files that were copied
    to another machine may lack their ``.git``, or have that of another commit. It is a hash of 7 to 40
    digits, with ``-dirty`` after it if files differ from that commit.

    Changes in the paths ``ignore``, relative to ``root``, do not count as modifications.

    Raises:
        ValueError: ``AWNET_COMMIT`` is not such a hash.
    """
    stated = os.environ.get("AWNET_COMMIT", "")
    if stated and root == _ROOT:
        if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", stated):
            raise ValueError(f"AWNET_COMMIT must be a commit's hash, or HASH-dirty, got {stated!r}")
        return Commit(stated.removesuffix("-dirty"), stated.endswith("-dirty"))

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    changes = ["status", "--porcelain", "--untracked-files=no"]
    if ignore:
        changes += ["--", ".", *(f":(exclude){path}" for path in ignore)]
    try:
        # a package that is installed inside another project's checkout must not report that project's commit
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return Commit(None, None)
        return Commit(git("rev-parse", "HEAD"), bool(git(*changes)))
    except (OSError, subprocess.SubprocessError):
        return Commit(None, None)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, number of threads and commit, as reports and run folders store them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    commit = git_commit()
    return {
        "awnet": __version__,
        "torch": str(torch.__version__),  # torch's own subclass of str would need torch to be unpickled
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "commit": commit.hash,
        "modified": commit.modified,
    }
