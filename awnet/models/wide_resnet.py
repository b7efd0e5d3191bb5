"""WideResNets (Zagoruyko and Komodakis, 2016) for small images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from awnet.models.common import WithInferenceCopy, config, scaled
from awnet.models.hub import OnHub
from awnet.nn.backbone import WideBackbone
from awnet.nn.inference import PlainInferenceCopy, register_inference_copy
from awnet.nn.layers import Activation

# name → depth, widening factor
_SIZES = {"wrn34_8": (34, 8), "wrn34_10": (34, 10), "wrn70_16": (70, 16)}
NAMES = tuple(_SIZES)


def _architecture(name: str, width: float) -> tuple[int, int, list[int]]:
    """Blocks per stage, width of the stem, widths of the stages."""
    depth, widening = _SIZES[name]
    return (depth - 4) // 6, scaled(16, width), [scaled(base * widening, width) for base in (16, 32, 64)]


def backbone(name: str, width: float, **options: Any) -> WideBackbone:
    """The network ``name``, every layer ``width`` times as wide, with :class:`WideBackbone`'s options."""
    return WideBackbone(*_architecture(name, width), **options)


@register_inference_copy(PlainInferenceCopy)
class WideResNet(WideBackbone, WithInferenceCopy, OnHub):
    """A static WideResNet of pre-activation blocks, without dropout, as in adversarial training.

    ``wrn34_10`` has depth 34 and widening factor 10. ``width`` multiplies the channels of every layer;
    ``activation`` replaces every ReLU, see :class:`awnet.nn.AWConv2d`.
    """

    def __init__(
        self,
        name: str = "wrn34_10",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        activation: Activation = "relu",
    ) -> None:
        if name not in _SIZES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        super().__init__(
            *_architecture(name, width),
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
