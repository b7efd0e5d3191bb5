"""Runs code with torch's initial default dtype and device."""

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

    Tensors that are created without a dtype or a device are then the same as in a new process, so that
    results do not depend on ``torch.set_default_dtype`` and ``torch.set_default_device``. Both are restored
    afterwards. The default dtype belongs to the process: it is restored when the last of several blocks ends,
    in any thread.
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
