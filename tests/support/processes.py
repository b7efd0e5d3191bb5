"""Processes that start at once: a server that has imported torch and awnet forks them, before it has any thread."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch.distributed", "awnet.training", "awnet.evaluation", "pytest"])


def start(function: Callable[..., object], *arguments: Any, output: Path | None = None) -> ForkServerProcess:
    """Calls a function of a module on one thread in another process; ``output`` gets what it prints."""
    process = context.Process(target=_run, args=(function, arguments, output))
    process.start()
    return process


def _run(function: Callable[..., object], arguments: tuple[Any, ...], output: Path | None) -> None:
    torch.set_num_threads(1)
    if output is not None:
        sys.stdout = sys.stderr = output.open("w", buffering=1, encoding="utf-8")
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
    function(*arguments)
