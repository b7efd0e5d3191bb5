"""Checks of values, for the package's public edge: attacks, evaluation and data.

They read values back to the host, so they run once a call and never inside a compiled or captured op.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_images(x: Tensor, name: str = "x") -> None:
    """Raises unless ``x`` is a batch of images: float32 or float64 ``[B, C, H, W]``, finite, in [0, 1]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor of images [B, C, H, W], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{name} must have shape [B, C, H, W], got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        hint = (
            "divide 8-bit images by 255" if not x.is_floating_point() else "use torch.autocast to save time"
        )
        raise TypeError(f"{name} must be float32 or float64 in [0, 1], got {x.dtype}: {hint}")
    if x.numel() == 0:
        return
    low, high = torch.stack(x.detach().aminmax()).tolist()  # NaN comes through as NaN
    if not (low >= 0 and high <= 1):
        if torch.isfinite(x).all():
            raise ValueError(
                f"{name} must hold images in [0, 1], got values from {low:g} to {high:g}: "
                "scale them, and leave normalisation to the model"
            )
        raise ValueError(
            f"{name} must be finite, got NaN or infinite values: look at how the images are made"
        )


def check_labels(y: Tensor, num_classes: int | None = None, name: str = "y") -> int:
    """Raises unless ``y`` is int64 ``[B]`` with labels from 0 to ``num_classes - 1``; returns the largest.

    Without ``num_classes`` only negative labels are refused. An empty batch gives -1.
    """
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a Tensor of labels [B], got {type(y).__name__}")
    if y.dim() != 1:
        raise ValueError(f"{name} must have shape [B], one label an image, got {list(y.shape)}")
    if y.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {y.dtype}: call {name}.long()")
    if y.numel() == 0:
        return -1
    low, high = torch.stack(y.aminmax()).tolist()
    if low < 0:
        raise ValueError(f"{name} must hold labels from 0 on, got {low}")
    if num_classes is not None and high >= num_classes:
        raise ValueError(f"{name} must hold labels below num_classes = {num_classes}, got {high}")
    return int(high)
