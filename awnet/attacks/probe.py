"""Checks a model with one forward pass, before anything is trained, attacked or written."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from awnet.attacks.base import frozen


def first_logits(model: nn.Module, x: Tensor, num_classes: int, dataset: str) -> Tensor:
    """The logits [B, K] of ``x`` in eval mode. Raises ValueError, with advice, if the model does not fit.

    Args:
        num_classes: the number of classes of the data set; K must be at least as large.
        dataset: the name of the data set, for the message.
    """
    try:
        with frozen(model), torch.no_grad():
            logits = model(x)
    except (RuntimeError, TypeError) as error:
        message = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the model failed on images {list(x.shape)} of {dataset}: {_cause(model, x)}{message}"
        ) from error
    expected = f"logits [B, {num_classes}] for {dataset}"
    if not isinstance(logits, Tensor):
        advice = "wrap the model so that its forward returns the logits alone"
        if isinstance(logits, tuple | list):
            kinds = ", ".join(type(one).__name__ for one in logits[:4])
            raise ValueError(
                f"model must return {expected}, got a {type(logits).__name__} of {kinds}: {advice}"
            )
        raise ValueError(f"model must return {expected}, got {type(logits).__name__}: {advice}")
    if logits.dim() != 2 or logits.shape[1] < num_classes:
        raise ValueError(
            f"model must return {expected}, got {list(logits.shape)} for one image: create it with "
            f"num_classes={num_classes}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"model must return {expected} in floating point, got {logits.dtype}")
    return logits


def _cause(model: nn.Module, x: Tensor) -> str:
    """The mismatch of device or dtype between model and images, with advice; empty if there is none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}: call model.to({str(x.device)!r}). "
        if tensor.is_floating_point() and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, the images are {x.dtype}: call model.float(). "
    return ""
