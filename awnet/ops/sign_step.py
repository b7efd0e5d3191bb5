"""One step of a sign-gradient attack in its ball."""

from __future__ import annotations

import torch
from torch import Tensor

from awnet.ops import dispatch, self_check
from awnet.ops.backends import triton as triton_backend
from awnet.ops.transforms import transform


def sign_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float, *, cast: Tensor | None = None
) -> Tensor:
    """x_adv + step_size · sign(grad), clipped to [x − eps, x + eps] and to [0, 1].

    One kernel if Triton runs and no derivative is required. If ``grad`` is NaN the pixel may stay or
    become NaN: the caller must check gradients for NaN separately.

    Args:
        x_adv, x: images in [0, 1] of one shape and dtype.
        grad: of their shape, any floating dtype; a pixel with gradient 0 does not change.
        step_size, eps: in image units.
        cast: a tensor of their shape and another dtype that receives a copy of the result, for a model in
            bfloat16.

    Returns:
        A new tensor like ``x_adv``.
    """
    for name, other in (("grad", grad), ("x", x), ("cast", cast)):
        if other is not None and other.shape != x_adv.shape:
            raise ValueError(f"{name} must have x_adv's shape {list(x_adv.shape)}, got {list(other.shape)}")
    if _runs_triton(x_adv, grad, x):
        stepped: Tensor = torch.ops.awnet.sign_step_triton(x_adv, grad, x, step_size, eps, cast)
        return stepped
    low, high = (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
    stepped = torch.add(x_adv, grad.sign().to(x_adv.dtype), alpha=step_size).clamp_(low, high)
    if cast is not None:
        cast.copy_(stepped)
    return stepped


def _runs_triton(*images: Tensor) -> bool:
    if dispatch.chosen_backend() not in (None, "triton"):
        return False
    reason = triton_backend.obstacle(images[0])
    if reason is not None:
        if reason.startswith(self_check.FAILED):
            self_check.report("triton", reason)
        return False
    # the kernel has no derivative, torch's own operations have
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in images)
    return not differentiated and transform(images) is None
