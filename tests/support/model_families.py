"""Every family of networks in a narrow version."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from awnet.models import create_model
from support.extras import optional

# name → options of a narrow version
NARROW: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 0.1},
    "wrn34_8": {"width": 0.06},
    "vgg16_bn": {"width": 0.125},
    "repvgg_a2": {"width": 0.1},
    "mobilenet_v2": {"width": 0.1},
    "swin_t": {"width": 0.15, "image_size": 8},
    "rdi_resnet38": {"width": 0.25},
    "advmoe_resnet18": {"width": 0.1, "experts": 3},
    "separate_net": {"width": 0.1, "router_widths": (8, 16)},
    "awnet_resnet18": {"width": 0.1},
    "awnet_resnet50": {"width": 0.05, "router_widths": (8, 16)},
    "awnet_wrn34_10": {"width": 0.05, "router_widths": (8, 16)},
    "awnet_mobilenet_v2": {"width": 0.1, "router_widths": (8, 16)},
}
OWN_RECIPES = [("rdi", "rdi_resnet38"), ("advmoe", "advmoe_resnet18"), ("separate", "separate_net")]


def narrow(name: str) -> nn.Module:
    """The narrow version for images of one channel, its weights always the same."""
    needs(name)
    torch.manual_seed(0)
    return create_model(name, in_channels=1, **NARROW[name])


def mode(model: nn.Module, batch: int) -> dict[str, torch.Tensor]:
    """What the model wants beside the images in training: half of them are taken as clean."""
    return {"is_clean": torch.arange(batch) % 2 == 0} if hasattr(model, "route") else {}


def needs(name: str) -> None:
    """Skips a Swin where timm cannot be imported."""
    if name.startswith("swin"):
        optional("timm")
