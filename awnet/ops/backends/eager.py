"""The ``eager`` backend: plain torch, on any device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from awnet.ops.args import LayerArgs, Saved, unflatten
from awnet.ops.autograd import PassesBackend
from awnet.ops.backends.base import Passes
from awnet.ops.backends.reference import equations


class Eager(PassesBackend):
    name = "eager"
    summary = "one convolution and one affine map in plain torch, gradients by the centered formulas"

    def __init__(self) -> None:
        super().__init__("eager", Passes())

    def not_supported(self, args: LayerArgs) -> str | None:
        return None


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The layer's operator of this backend in operators of torch, for exporters; eval mode only.

    A table for ``ExportedProgram.run_decompositions``.
    """
    return {torch.ops.awnet.layer_eager.default: _in_torch_operators}


def _in_torch_operators(*flat: Any) -> tuple[Tensor, ...]:
    args, _, _ = unflatten(flat)
    y = equations(args, scale_outputs=True)
    return (y, *(y.new_empty(0) for _ in Saved._fields[1:]))
