"""For the tests in tests/kernels/: the device that Triton kernels run on, and tensors between guard bands.

Those files run on a CUDA device where there is one, and else on the CPU through Triton's interpreter. The
interpreter must be chosen before Triton is imported and cannot share a process with the compiler, so
tests/test_triton_kernels_in_interpreter.py runs them in processes of their own with TRITON_INTERPRET=1. To work on one of them:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_passes.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")


def _hurry() -> None:
    """Leaves out what takes most of the interpreter's time with kernels as small as those of the tests.

    It would make ``triton.language`` its own anew at each call of a kernel and of each function within it; now
    it does so once. And it would look for overflow in all integers, only to drop what it finds: that is asserted
    with ``debug`` alone.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: SimpleNamespace(restore=lambda: None)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


if INTERPRETED:
    _hurry()

_GUARD = 256  # elements: a multiple of every alignment that kernels assume


class Guarded:
    """Makes tensors that lie between two bands of a known value; :meth:`check` finds who wrote outside.

    The interpreter does not catch an access out of bounds. The bands hold -77, which an illegal read brings
    into a sum; a new output is NaN all over, so that an element that was never written shows.
    """

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def _between_bands(self, numel: int, dtype: torch.dtype) -> Tensor:
        return torch.full((numel + 2 * _GUARD,), -77, dtype=dtype, device=DEVICE)

    def output(self, like: Tensor) -> Tensor:
        """NaN everywhere, in integers 99, in the shape, strides, and dtype of the dense tensor ``like``."""
        whole = self._between_bands(like.numel(), like.dtype)
        inside = whole[_GUARD : _GUARD + like.numel()].fill_(float("nan") if like.is_floating_point() else 99)
        self._made.append((whole, inside, None))
        return inside.as_strided(like.shape, like.stride())

    def input(self, values: Tensor) -> Tensor:
        """The dense tensor ``values`` with its strides; nothing may write to it."""
        whole = self._between_bands(values.numel(), values.dtype)
        inside = whole[_GUARD : _GUARD + values.numel()]
        made = inside.as_strided(values.shape, values.stride())
        made.copy_(values)
        self._made.append((whole, inside, inside.clone()))
        return made

    def check(self) -> None:
        """Raises AssertionError where a band or an input was written to."""
        for whole, inside, before in self._made:
            bands = torch.cat([whole[:_GUARD], whole[_GUARD + inside.numel() :]])
            assert bool((bands == -77).all()), "a kernel wrote outside its tensor"
            same = before is None or torch.equal(inside.nan_to_num(7), before.nan_to_num(7))
            assert same, "a kernel wrote to an input"
