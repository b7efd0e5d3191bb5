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
    except Exception as error:  # the model is any code
        kind = "" if isinstance(error, RuntimeError | TypeError | ValueError) else f"{type(error).__name__}: "
        message = kind + " ".join(str(error).split())[:300]
        raise ValueError(
            f"the model failed on images {list(x.shape)} of {dataset}: {_cause(model, x)}{message}"
            f"{_advice(message)}"
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
    if not logits.is_floating_point():
        advice = "return the logits before argmax"
        raise ValueError(f"model must return {expected} in floating point, got {logits.dtype}: {advice}")
    if logits.dim() != 2 or logits.shape[1] < num_classes:
        advice = f"create it with num_classes={num_classes}"
        if logits.dim() > 2:
            advice = "reduce it to one value for each class, for example with logits.flatten(1)"
        raise ValueError(f"model must return {expected}, got {list(logits.shape)} for one image: {advice}")
    return logits


def _advice(message: str) -> str:
    """Advice for an error in a model's forward pass; empty if there is none."""
    if "Guard failed" in message and "size()[0]" in message:
        return ": export the program with a dynamic batch size (dynamic_shapes of torch.export.export)"
    if "shape" in message or "size" in message:
        return (
            ": give images of the shape that the model was made for, or resize them within it (--image-size, "
            "image_size of load_model)"
        )
    return ""


def _cause(model: nn.Module, x: Tensor) -> str:
    """The mismatch of device or dtype between model and images, with advice; empty if there is none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}: call model.to({str(x.device)!r}). "
        if tensor.is_floating_point() and tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, the images are {x.dtype}: call model.float(). "
    return ""
