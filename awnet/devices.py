"""Chooses a device by name."""

from __future__ import annotations

import torch
from torch import nn


def resolve_device(name: str | torch.device | None) -> torch.device:
    """The device ``name``, checked to exist; None means the GPU if there is one, else the CPU.

    Raises TypeError or ValueError for anything but the CPU and the CUDA devices of this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if not isinstance(name, str | torch.device):
            raise TypeError
        device = torch.device(name)
    except (RuntimeError, TypeError):
        kind = ValueError if isinstance(name, str) else TypeError
        raise kind(f"device must be cpu, cuda, cuda:1 or the like, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda, cuda:1 or the like, got {str(name)!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {str(name)!r} was given, but torch {torch.__version__} finds no GPU: use cpu, or "
            "install a torch built for your GPU"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(
            f"device {str(name)!r} was given, but this machine has {torch.cuda.device_count()} GPUs, cuda:0 "
            f"to cuda:{torch.cuda.device_count() - 1}"
        )
    return device


def check_has_values(model: nn.Module) -> None:
    """Raises ValueError if a parameter or buffer is on the meta device and so has no values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device, which holds no values: make the model on cpu or cuda (is "
                "meta torch's default device?), or load weights into it"
            )
