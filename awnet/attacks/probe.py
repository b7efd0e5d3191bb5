"""A model's first forward pass, before anything is trained, attacked or written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awnet.attacks.base import frozen


def first_logits(model: nn.Module, x: Tensor, num_classes: int, dataset: str) -> Tensor:
    """The logits [B, K] of ``x`` in eval mode; ValueError, saying what to change, where there are none.

    Args:
        num_classes: of the data set; K must be at least as large.
        dataset: its name, for the message.
    """
    try:
        with frozen(model), torch.no_grad():
            logits = model(x)
    except (RuntimeError, TypeError) as error:
        found = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the model failed on images {list(x.shape)} of {dataset}: {_cause(model, x)}{found}"
        ) from error
    wanted = f"logits [B, {num_classes}] for {dataset}"
    if not isinstance(logits, Tensor):
        cure = "wrap the model so that its forward returns the logits alone"
        if isinstance(logits, tuple | list):
            kinds = ", ".join(type(one).__name__ for one in logits[:4])
            raise ValueError(f"model must return {wanted}, got a {type(logits).__name__} of {kinds}: {cure}")
        raise ValueError(f"model must return {wanted}, got {type(logits).__name__}: {cure}")
    if logits.dim() != 2 or logits.shape[1] < num_classes:
        raise ValueError(
            f"model must return {wanted}, got {list(logits.shape)} for one image: create it with "
            f"num_classes={num_classes}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"model must return {wanted} in floating point, got {logits.dtype}")
    return logits


def _cause(model: nn.Module, x: Tensor) -> str:
    """What differs between model and images, and what to call; empty where nothing does."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}: call model.to({str(x.device)!r}). "
        if tensor.is_floating_point() and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, the images are {x.dtype}: call model.float(). "
    return ""
