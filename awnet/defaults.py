"""torch's default dtype and device, which a program may have changed, as they are at its start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

_lock = threading.Lock()
_depth = 0
_before = torch.float32


@contextmanager
def standard_defaults() -> Iterator[None]:
    """Default dtype float32 and default device cpu for a block of code; also a decorator.

    Tensors that are made without a dtype or a device then are what they are in a new process, so that figures
    do not depend on ``torch.set_default_dtype`` and ``torch.set_default_device``. Afterwards both are as they
    were. The dtype belongs to the process: it is restored when the last of several blocks ends, whichever
    thread it runs in.
    """
    global _depth, _before
    with _lock:
        if _depth == 0:
            _before = torch.get_default_dtype()
        _depth += 1
        if torch.get_default_dtype() != torch.float32:
            torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0 and _before != torch.float32:
                torch.set_default_dtype(_before)
