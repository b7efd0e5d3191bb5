"""Finds a data set's published folder."""

from __future__ import annotations

from pathlib import Path

from awnet.files import expanded


def find_folder(name: str, data_dir: str | Path, markers: dict[str, str]) -> tuple[Path, str]:
    """(the published folder, its marker file).

    ``markers``: folder name → a file that only this version has; the first existing one is taken.
    ``data_dir`` is the folder itself, under any name, or its parent.
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
