"""Whether a call is differentiated or vectorized by more than reverse-mode autograd.

The operators have a first derivative in reverse mode. torch treats the tangents of an operator without a
forward-mode rule as zero, without a warning, and has no ``torch.func`` rules for them: such calls need
``reference``, which is made of torch operations only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transform(tensors: Iterable[Any]) -> str | None:
    """The active transform beyond reverse mode, as the reason why a backend cannot run; else None."""
    if torch._C._are_functorch_transforms_active():
        return "it has no rules for torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap)"
    return "it has no forward-mode derivative" if has_tangent(tensors) else None


def has_tangent(tensors: Iterable[Any]) -> bool:
    """Whether one of ``tensors`` carries a tangent of forward-mode differentiation."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def refuse_tangents(arguments: Iterable[Any]) -> None:
    """Raises RuntimeError if an operator, for example in a compiled graph, would lose a tangent."""
    try:
        lost = has_tangent(arguments)
    except RuntimeError:  # unknown in a compiled graph; within a dual level there may be a tangent
        lost = True
    if lost:
        raise RuntimeError(
            "this layer has no forward-mode derivative; call it with backend='reference' (or inside `with "
            "awnet.use_backend('reference')`), which has one"
        )
