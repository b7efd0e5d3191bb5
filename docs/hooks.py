"""Reads the repository's address from pyproject.toml, the one place that names it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    project = tomllib.loads((Path(config.config_file_path).parent / "pyproject.toml").read_text("utf-8"))
    address = project["project"]["urls"]["Repository"]
    if "/OWNER/" not in address:  # no public home yet: no link
        config.repo_url, config.repo_name = address, address.split("github.com/")[-1]
    return config
