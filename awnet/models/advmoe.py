"""ADVMOE (Zhang et al., "Robust Mixture-of-Expert Training for CNNs", ICCV 2023) on a CIFAR ResNet-18."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from awnet.models.common import WithInferenceCopy, config, scaled
from awnet.models.hub import OnHub
from awnet.models.resnet import ARCHITECTURES
from awnet.nn import AWConv2d, Backbone, FilterScaledConv2d, MixBatchNorm2d, WithRouter
from awnet.nn.inference import PlainInferenceCopy, register_inference_copy, register_layers
from awnet.nn.layers import check_image, check_sizes
from awnet.scalars import check_integer

fx.wrap("check_image")

NAMES = ("advmoe_resnet18",)
_ROUTER_WIDTHS, _ROUTER_BLOCKS = (16, 32, 64), (3, 3, 3)


class ExpertConv2d(nn.Module):
    """A convolution with ``experts`` sets of filters, one of which a gate selects for each sample.

    All sets are one convolution of experts · C_out filters, which the gate scales for each sample as ω does
    in AW-Net; the results are added: π = Σ_e g_e · conv_e(x). With a one-hot gate this is the output of
    expert e, and the gradient of the gate depends on the outputs of all experts. It costs ``experts`` times
    as much as one convolution, but shapes never depend on the choice.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.convolution = FilterScaledConv2d(in_channels, experts * out_channels, 3, stride, 1, bias=False)

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        """``input`` [B, C_in, H, W], ``gate`` [B, experts] → [B, C_out, H/stride, W/stride]."""
        filters = self.convolution.out_channels // self.experts
        all_experts = self.convolution(input, gate.repeat_interleave(filters, dim=1))
        return all_experts.unflatten(1, (self.experts, filters)).sum(1)


class ExpertBlock(nn.Module):
    """The basic block with two expert convolutions; all experts share the shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int, experts: int) -> None:
        super().__init__()
        self.conv1 = ExpertConv2d(in_channels, width, stride, experts)
        self.norm1 = MixBatchNorm2d(width, branches="one")
        self.conv2 = ExpertConv2d(width, width, 1, experts)
        self.norm2 = MixBatchNorm2d(width, branches="one")
        self.shortcut = None
        if stride != 1 or in_channels != width:
            self.shortcut = AWConv2d(in_channels, width, 1, stride, dynamic=False, activation=None, bn="one")

    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        """``input`` [B, C_in, H, W], ``gate`` [B, experts] → [B, width, H/stride, W/stride]."""
        residual = input if self.shortcut is None else self.shortcut(input)
        hidden = F.relu(self.norm1(self.conv1(input, gate)))
        return F.relu(self.norm2(self.conv2(hidden, gate)) + residual)


register_layers(ExpertConv2d, ExpertBlock)


@register_inference_copy(PlainInferenceCopy)
class ADVMOE(WithRouter, WithInferenceCopy, OnHub):
    """ResNet-18 with ``experts`` sets of filters in its block convolutions, and a small ResNet as router.

    The router scores the experts once per image, and the best one is used in every layer. The choice is
    one-hot, with a straight-through gradient to the scores.

    Args:
        name: ``advmoe_resnet18``.
        num_classes, in_channels: K and C.
        experts: n, at least 1.
        width: multiplies the channels of every layer, also of the router (``ratio`` in the published code
            narrows only the experts).
    """

    def __init__(
        self,
        name: str = "advmoe_resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        experts: int = 2,
        width: float = 1.0,
    ) -> None:
        if name not in NAMES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        check_sizes(num_classes, in_channels)
        experts = check_integer("experts", experts, 1)
        super().__init__()
        self.in_channels = in_channels
        _, blocks, widths = ARCHITECTURES[name.removeprefix("advmoe_")].scaled(width)
        channels = widths[0]
        self.stem = AWConv2d(in_channels, channels, 3, 1, 1, dynamic=False, bn="one")
        self.blocks = nn.ModuleList()
        for i, (stage_width, count) in enumerate(zip(widths, blocks, strict=True)):
            for j in range(count):
                self.blocks.append(ExpertBlock(channels, stage_width, 2 if i > 0 and j == 0 else 1, experts))
                channels = stage_width
        self.classifier = nn.Linear(channels, num_classes)
        self.router = Backbone(
            "basic",
            _ROUTER_BLOCKS,
            [scaled(stage_width, width) for stage_width in _ROUTER_WIDTHS],
            num_classes=experts,
            in_channels=in_channels,
            dynamic=False,
            bn="one",
        )
        self.config: dict[str, Any] = config(name, num_classes, in_channels, experts=experts, width=width)

    def gate(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] → the chosen expert, one-hot [B, experts], with the gradient of the scores."""
        scores = self.router(x)
        chosen = F.one_hot(scores.argmax(1), scores.shape[1]).to(scores.dtype)
        return chosen + (scores - scores.detach())  # adds 0

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [0, 1] → logits [B, num_classes]."""
        check_image(x, self.in_channels)
        gate = self.gate(x)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, gate)
        return self.classifier(x.mean((2, 3)))
