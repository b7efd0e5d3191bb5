"""Checks of images and labels. Attacks and evaluation call them once per batch, the layers never."""

from __future__ import annotations

from torch import Tensor
from torch import int64 as torch_int64

ROUNDING = 1e-3  # values that exceed [0, 1] by less are reported as rounding; they are errors too


def check_images(x: Tensor, name: str = "x") -> None:
    """Raises unless ``x`` is a floating-point tensor ``[B, C, H, W]`` of finite values in [0, 1].

    TypeError for something that is not a floating-point tensor, ValueError for its shape or values.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor [B, C, H, W], got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point in [0, 1], got {x.dtype}; for uint8: x.float() / 255")
    if x.dim() != 4:
        raise ValueError(f"{name} must be [B, C, H, W], got {list(x.shape)}; pass one image as x[None]")
    if x.numel() == 0:
        return
    low, high = (float(v) for v in x.detach().aminmax())  # a NaN anywhere makes both NaN
    if low >= 0.0 and high <= 1.0:
        return
    if not bool(x.detach().isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite values; images must be finite and in [0, 1]")
    if low > -ROUNDING and high < 1 + ROUNDING:
        raise ValueError(
            f"{name} must be in [0, 1], got values from {low:.9g} to {high:.9g}, outside it by rounding "
            f"(for example of a resize): call {name}.clamp(0, 1)"
        )
    raise ValueError(
        f"{name} must be in [0, 1], got values from {low:g} to {high:g}; "
        "divide by 255, or undo the normalization (it belongs inside the model)"
    )


def check_labels(y: Tensor, num_classes: int | None = None, name: str = "y") -> None:
    """Raises unless ``y`` is int64 ``[B]`` with values in [0, num_classes), or at least 0 if None."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of class numbers [B], got {type(y).__name__}")
    if y.dtype != torch_int64:
        raise TypeError(f"{name} must be int64 class numbers, got {y.dtype}")
    if y.dim() != 1:
        raise ValueError(f"{name} must be [B], got {list(y.shape)}; convert one-hot labels with .argmax(1)")
    if y.numel() == 0:
        return
    low, high = (int(v) for v in y.aminmax())
    if low < 0 and num_classes is None:
        raise ValueError(f"{name} must hold class numbers of at least 0, got {low}")
    if num_classes is not None and (low < 0 or high >= num_classes):
        raise ValueError(
            f"{name} must be in [0, {num_classes}), got labels from {low} to {high}; "
            "the labels do not match the model's number of classes"
        )
