"""One step of a sign-gradient attack in its ball."""

from __future__ import annotations

import torch
from torch import Tensor

from awnet.ops import dispatch
from awnet.ops.autograd import register_operator
from awnet.ops.backends import triton as triton_backend
from awnet.ops.launch_config import launch_parameters
from awnet.ops.transforms import transform


def sign_step(
    x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float, *, cast: Tensor | None = None
) -> Tensor:
    """x_adv + step_size · sign(grad), clipped to [x − eps, x + eps] and to [0, 1].

    One kernel where Triton runs and no derivative is required. Where ``grad`` is NaN the pixel may stay or
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
    if dispatch.chosen_backend() not in (None, "triton") or triton_backend.obstacle(images[0]) is not None:
        return False
    # the kernel has no derivative, torch's own operations have
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in images)
    return not differentiated and transform(images) is None


def _alike(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides of ``like``; a copy only where its strides differ."""
    return x if x.stride() == like.stride() else torch.empty_like(like, dtype=x.dtype).copy_(x)


def _on_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float, cast: Tensor | None
) -> Tensor:
    config = launch_parameters("sign_step", x.device, len(x), 1, x[0].numel() if len(x) else 1)
    start = _dense(x_adv)
    copied = None if cast is None or cast.stride() != start.stride() else cast
    stepped: Tensor = triton_backend.kernels("sign_step").sign_step(
        start, _alike(grad, start), _alike(x, start), step_size, eps, config, cast=copied
    )
    if cast is not None and copied is None:
        cast.copy_(stepped)
    return stepped


def _fake_on_triton(
    x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float, eps: float, cast: Tensor | None
) -> Tensor:
    return torch.empty_like(_dense(x_adv))


def _dense(x: Tensor) -> Tensor:
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.clone()


register_operator(
    "sign_step_triton",
    "(Tensor x_adv, Tensor grad, Tensor x, float step_size, float eps, Tensor(a!)? cast) -> Tensor",
    _on_triton,
    _fake_on_triton,
)
