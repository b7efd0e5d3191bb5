"""Packages that only tests use, as independent oracles: where one is not installed, its tests are skipped."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HELD: list[torch.library.Library] = []  # the schemas live as long as these do


def optional(name: str) -> ModuleType:
    """The module ``name``, of timm, torchattacks or the like; skips the test where it cannot be imported."""
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        pytest.skip(f"{top} is optional and not installed")
    importable_torchvision()
    return importlib.import_module(name)


def make_absent(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Imports of ``package`` fail during the test as if it were not installed."""

    class Absent:
        @staticmethod
        def find_spec(name: str, *arguments: object) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    forget(monkeypatch, package)
    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])


def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """During the test ``package`` is imported anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@functools.cache
def importable_torchvision() -> None:
    """Lets torchvision, which those packages import, be imported; skips the test where there is none.

    Beside a torch that its own library was not built for (a CPU torch, with the wheel of PyPI) that library does
    not load, and then torchvision fails on operators that it wants fake kernels for. They are declared here,
    without any kernel. No test calls them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        pytest.skip("torchvision is optional and not installed")
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        registered = (Path(found.origin).parent / "_meta_registrations.py").read_text()
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in sorted(set(re.findall(r'register_fake\("torchvision::(\w+)"', registered))):
            library.define(f"{name}() -> ()")
        HELD.append(library)
        importlib.import_module("torchvision")
