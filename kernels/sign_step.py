"""One step of a sign-gradient attack: move, clip to the ball, clip to [0, 1], cast; one kernel."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Case, Table, launch


@triton.jit
def sign_step_kernel(moved, cast, x_adv, grad, x, step_size, eps, total, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < total
    g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
    start = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    here = tl.load(x_adv + place, mask=mask, other=0.0).to(tl.float32)
    here += tl.where(g > 0, step_size, tl.where(g < 0, -step_size, 0.0))
    here = tl.minimum(tl.maximum(here, tl.maximum(start - eps, 0.0)), tl.minimum(start + eps, 1.0))
    tl.store(moved + place, here.to(moved.dtype.element_ty), mask=mask)
    if cast is not None:
        tl.store(cast + place, here.to(cast.dtype.element_ty), mask=mask)


def sign_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    how: Mapping[str, int],
    *,
    out: Tensor | None = None,
    cast: Tensor | None = None,
) -> Tensor:
    """x_adv + step_size · sign(grad), clipped to [x − eps, x + eps] and to [0, 1].

    sign(NaN) is 0, as in torch: who calls this must look for broken gradients elsewhere.

    Args:
        x_adv, x: images in [0, 1] of one dtype.
        grad: of any floating dtype; 0 leaves a pixel alone.
        step_size, eps: in image units.
        how: launch parameters ``tile``, ``warps``.
        out: where to write, ``x_adv`` itself if wanted; a new tensor if None.
        cast: a tensor of another dtype that gets the result too, for a model in bfloat16.

    Raises:
        ValueError: the tensors differ in shape or strides, or are not dense.
    """
    out = torch.empty_like(x_adv) if out is None else out
    tensors = {"x_adv": x_adv, "grad": grad, "x": x, "out": out} | ({} if cast is None else {"cast": cast})
    for name, tensor in tensors.items():
        if tensor.shape != x_adv.shape or tensor.stride() != x_adv.stride():
            raise ValueError(
                f"{name} must have x_adv's shape {list(x_adv.shape)} and strides {x_adv.stride()}, got "
                f"{list(tensor.shape)} and {tensor.stride()}"
            )
    if not torch.ops.aten.is_non_overlapping_and_dense(x_adv):
        raise ValueError(f"x_adv must be dense, got shape {list(x_adv.shape)} and strides {x_adv.stride()}")
    total = x_adv.numel()
    launch(
        sign_step_kernel,
        -(-total // how["tile"]),
        out,
        cast,
        x_adv,
        grad,
        x,
        step_size,
        eps,
        total,
        TILE=how["tile"],
        warps=how["warps"],
    )
    return out


def cases(table: Table) -> Iterator[Case]:
    """In float32, and with a bfloat16 gradient and copy."""
    x = torch.empty(256, 3, 32, 32, device="meta")
    low = x.bfloat16()
    for key, how in table.items():
        if key.split("@")[0].split("/")[0] == "sign_step":
            yield Case(f"{key} float32", partial(sign_step, x, x, x, 0.01, 0.03, how))
            yield Case(
                f"{key} bfloat16", partial(sign_step, x, low, x, 0.01, 0.03, how, cast=low), quick=True
            )
