"""The arithmetic that an evaluation runs in."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from awnet.nn import frozen_copy

PrecisionName = Literal["float32", "bfloat16"]

SAID = {"float32": "float32, TF32 off", "bfloat16": "bfloat16"}
"""What reports say of each precision."""


def judged(model: nn.Module, precision: PrecisionName) -> nn.Module:
    """What stands for ``model`` in an evaluation: no gradient of it reaches a weight.

    A model that offers ``frozen(dtype)`` is replaced by that copy, in its own dtype for ``"float32"``: the
    same logits but for rounding. Another model is itself in float32, and runs under autocast in bfloat16.
    """
    if precision not in SAID:
        raise ValueError(f"precision must be one of {', '.join(SAID)}, got {precision!r}")
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    copy = frozen_copy(model, dtype)
    if copy is not None:
        return copy
    return model if dtype is None else _Autocast(model)


class _Autocast(nn.Module):
    """A model whose passes run in bfloat16 where torch holds that safe."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name == "model" or name in self.__dict__["_modules"]:
            return super().__getattr__(name)
        found = getattr(self.model, name)
        if name not in ("route", "exit_of"):
            return found

        def run(x: Tensor) -> Any:
            with torch.autocast(x.device.type, torch.bfloat16):
                return found(x)

        return run

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x, **arguments)
        return logits
