"""One step of a sign-gradient attack in one kernel: move, clip to the ball, clip to [0, 1], cast."""

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
def sign_step_kernel(
    out_ptr,
    cast_ptr,  # like out in another dtype, or None
    x_adv_ptr,
    grad_ptr,
    x_ptr,
    step_size,
    eps,
    numel,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    x_adv = tl.load(x_adv_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    x_adv += tl.where(grad > 0, step_size, tl.where(grad < 0, -step_size, 0.0))
    x_adv = tl.minimum(tl.maximum(x_adv, tl.maximum(x - eps, 0.0)), tl.minimum(x + eps, 1.0))
    tl.store(out_ptr + offsets, x_adv.to(out_ptr.dtype.element_ty), mask=in_bounds)
    if cast_ptr is not None:
        tl.store(cast_ptr + offsets, x_adv.to(cast_ptr.dtype.element_ty), mask=in_bounds)


def sign_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    step_size: float,
    eps: float,
    config: Mapping[str, int],
    *,
    out: Tensor | None = None,
    cast: Tensor | None = None,
) -> Tensor:
    """x_adv + step_size · sign(grad), clipped to [x − eps, x + eps] and to [0, 1].

    sign(NaN) is 0, so a broken gradient moves nothing: the caller must check for it.

    Args:
        x_adv, x: images in [0, 1] of one dtype.
        grad: of any floating dtype; 0 leaves a pixel unchanged.
        step_size, eps: in image units.
        config: launch parameters ``tile``, ``warps``.
        out: the tensor to write to, which may be ``x_adv``; a new tensor if None.
        cast: a tensor of another dtype to write the result to as well, for a model in bfloat16.

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
    launch(
        sign_step_kernel, -(-x_adv.numel() // config["tile"]),
        out, cast, x_adv, grad, x, step_size, eps, x_adv.numel(), BLOCK=config["tile"], warps=config["warps"],
    )  # fmt: skip
    return out


def cases(table: Table) -> Iterator[Case]:
    """In float32, and with a bfloat16 gradient and copy."""
    x = torch.empty(256, 3, 32, 32, device="meta")
    low = x.bfloat16()
    for key, config in table.items():
        if key.split("@")[0].split("/")[0] == "sign_step":
            yield Case(f"{key} float32", partial(sign_step, x, x, x, 0.01, 0.03, config))
            yield Case(
                f"{key} bfloat16", partial(sign_step, x, low, x, 0.01, 0.03, config, cast=low), quick=True
            )
