"""Collects versions, devices, backends (with reasons if unavailable), models, data sets, attacks, recipes."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from awnet._version import __version__
from awnet.attacks import list_attacks
from awnet.data import list_datasets
from awnet.models import list_models
from awnet.ops import self_check
from awnet.ops.backends import amx
from awnet.ops.dispatch import available_backends
from awnet.training import list_recipes

_PACKAGES = ("torch", "triton", "numpy", "scikit-learn", "safetensors", "timm")


def collect(renew_self_check: bool = False) -> dict[str, Any]:
    """What ``awnet info`` prints, as values that JSON can hold.

    ``backends`` maps each backend to None if it is available, else to the reason; ``self_checks`` has the
    result of each backend that was checked. ``renew_self_check`` runs the checks again.
    """
    if renew_self_check:
        self_check.forget(renewed=True)
    backends = available_backends()
    return {
        "versions": {
            "awnet": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            "cuda (torch)": torch.version.cuda,
        },
        "devices": _devices(),
        "backends": backends,
        "self_checks": {name: text for name in backends if (text := self_check.status(name)) is not None},
        "models": list_models(),
        "datasets": list_datasets(),
        "attacks": list(list_attacks()),
        "recipes": list_recipes(),
    }


def render(facts: dict[str, Any]) -> RenderableType:
    """The result of :func:`collect` for a terminal."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    def section(title: str, rows: dict[str, str]) -> None:
        for i, (name, value) in enumerate(rows.items()):
            table.add_row(title if i == 0 else "", f"{escape(name)}{'  ' if value else ''}{escape(value)}")

    section("versions", {name: value or "–" for name, value in facts["versions"].items()})
    section("devices", facts["devices"])
    checks = facts["self_checks"]
    runs = {name: f"runs here{f', {checks[name]}' if name in checks else ''}" for name in facts["backends"]}
    section("backends", {name: why or runs[name] for name, why in facts["backends"].items()})
    for key in ("models", "datasets", "attacks", "recipes"):
        section(key, {" ".join(facts[key]): ""})
    return Group(table)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    obstacle = amx.obstacle()
    devices = {
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "amx": f"frozen bfloat16 networks run on {'it' if obstacle is None else f'the library: {obstacle}'}",
    }
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"compute capability {properties.major}.{properties.minor}"
        )
    return devices
