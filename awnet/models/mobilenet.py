"""MobileNet-v2 (Sandler et al., 2018) for small images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from awnet.models.common import WithInferenceCopy, config, scaled
from awnet.models.hub import OnHub
from awnet.nn.backbone import MobileBackbone
from awnet.nn.inference import PlainInferenceCopy, register_inference_copy

NAMES = ("mobilenet_v2",)
# expansion, width, blocks, stride; the stem and the stage of width 24 keep the size (2 in the original)
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def _architecture(width: float) -> tuple[list[tuple[int, int, int, int]], int, int]:
    """Settings of the stages, widths of the stem and of the last convolution."""
    stages = [
        (expansion, scaled(channels, width), blocks, stride)
        for expansion, channels, blocks, stride in _STAGES
    ]
    return stages, scaled(32, width), scaled(1280, width)


def backbone(
    width: float, *, dynamic_shortcut: bool = False, activation: str | None = "relu", **options: Any
) -> MobileBackbone:
    """The network, every layer ``width`` times as wide, with :class:`MobileBackbone`'s options."""
    if dynamic_shortcut:
        raise ValueError("dynamic_shortcut must be False: MobileNet-v2 has no shortcut convolutions")
    if activation != "relu":
        raise ValueError(f'activation must be "relu", got {activation!r}: MobileNet-v2 has ReLU6')
    return MobileBackbone(*_architecture(width), **options)


@register_inference_copy(PlainInferenceCopy)
class MobileNetV2(MobileBackbone, WithInferenceCopy, OnHub):
    """The static MobileNet-v2, without dropout. ``width`` multiplies the channels of every layer."""

    def __init__(
        self, name: str = "mobilenet_v2", num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0
    ) -> None:
        if name not in NAMES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        super().__init__(
            *_architecture(width), num_classes=num_classes, in_channels=in_channels, dynamic=False, bn="one"
        )
        self.config: dict[str, Any] = config(name, num_classes, in_channels, width=width)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images [B, in_channels, H, W] in [0, 1] → logits [B, num_classes]."""
        return super().forward(x)
