"""Static ResNets for small images: teachers, baselines, and the twins that AW-Nets are compared with."""

from __future__ import annotations

from bisect import bisect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from awnet.models.common import WithInferenceCopy, config, scaled
from awnet.models.hub import OnHub
from awnet.nn import AdversarialRouter
from awnet.nn.backbone import Backbone, BlockKind
from awnet.nn.inference import register_inference_copy
from awnet.nn.inference_network import InferenceBackbone, check_backbone
from awnet.nn.layers import Activation


class Architecture(NamedTuple):
    """Kind of block, and blocks and width of each stage."""

    block: BlockKind
    blocks: tuple[int, ...]
    widths: tuple[int, ...]

    def scaled(self, width: float) -> Architecture:
        """The same with every width multiplied by ``width``."""
        return self._replace(widths=tuple(scaled(stage_width, width) for stage_width in self.widths))


ARCHITECTURES = {
    "resnet18": Architecture("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
    "resnet34": Architecture("basic", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3), (64, 128, 256, 512)),
    "resnet_tiny": Architecture("basic", (1, 1, 1), (16, 32, 64)),
}
NAMES = (*ARCHITECTURES, "resnet_tiny_wide")


@register_inference_copy(InferenceBackbone, check_backbone)
class ResNet(Backbone, WithInferenceCopy, OnHub):
    """A static CIFAR ResNet: the AW-Net's dynamic sub-network with plain convolutions and one batch norm.

    It uses the same fused layer, so a comparison with an AW-Net measures only what the router adds.
    ``width`` multiplies the channels of every stage; ``activation`` replaces every ReLU, see
    :class:`awnet.nn.AWConv2d`.
    """

    def __init__(
        self,
        name: str = "resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        activation: Activation = "relu",
    ) -> None:
        if name == "resnet_tiny_wide":
            architecture = _wide(num_classes, in_channels, width)
        elif name in ARCHITECTURES:
            architecture = ARCHITECTURES[name].scaled(width)
        else:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        super().__init__(
            *architecture,
            num_classes=num_classes,
            in_channels=in_channels,
            dynamic=False,
            bn="one",
            activation=activation,
        )
        self.config: dict[str, Any] = config(
            name, num_classes, in_channels, width=width, activation=activation
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images [B, in_channels, H, W] in [0, 1] → logits [B, num_classes]."""
        return super().forward(x)


def _wide(num_classes: int, in_channels: int, width: float) -> Architecture:
    """Widths 25-50-c, with c such that the number of parameters is nearest to that of awnet_tiny.

    c is 98 for ten classes.
    """
    tiny = ARCHITECTURES["resnet_tiny"].scaled(width)

    def wide(last: int) -> Architecture:
        return Architecture("basic", (1, 1, 1), (scaled(25, width), scaled(50, width), last))

    def count(last: int) -> int:
        network = Backbone(
            *wide(last), num_classes=num_classes, in_channels=in_channels, dynamic=False, bn="one"
        )
        return parameter_count(network)

    with torch.device("meta"):  # counting needs no memory and draws no random numbers
        dynamic = Backbone(*tiny, num_classes=num_classes, in_channels=in_channels)
        router = AdversarialRouter(
            dynamic.signal_widths, in_channels=in_channels, widths=tiny.widths, blocks=tiny.blocks
        )
        target = parameter_count(dynamic) + parameter_count(router)
        last = bisect(range(scaled(128, width)), target, lo=1, key=count)  # the first with more
        return wide(min(last, max(1, last - 1), key=lambda c: abs(count(c) - target)))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, in units."""
    return sum(parameter.numel() for parameter in model.parameters())
