"""VGG-16 with batch norm (Simonyan and Zisserman, 2015) for small images."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from awnet.models.common import WithInferenceCopy, config, scaled
from awnet.models.hub import OnHub
from awnet.nn.inference import PlainInferenceCopy, register_inference_copy
from awnet.nn.layers import check_image, check_sizes

fx.wrap("check_image")

NAMES = ("vgg16_bn",)
_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, convolutions; a max-pool after each
_HIDDEN = 4096  # width of the two hidden linear layers
_DROPOUT = 0.5


@register_inference_copy(PlainInferenceCopy)
class VGG(WithInferenceCopy, OnHub):
    """Thirteen 3×3 convolutions with bias, batch norm and ReLU, a global average pool, three linear layers.

    The linear layers are 512-4096-4096-K with dropout ½ between them, as in the ImageNet network, except that
    the first one takes a pooled image. The max-pools round odd sizes up, so any size from 1×1 works.
    ``width`` multiplies the channels of every layer.
    """

    def __init__(
        self, name: str = "vgg16_bn", num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0
    ) -> None:
        if name not in NAMES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        check_sizes(num_classes, in_channels)
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = []
        channels = in_channels
        for stage_width, convolutions in _STAGES:
            for _ in range(convolutions):
                out = scaled(stage_width, width)
                layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        hidden = scaled(_HIDDEN, width)
        self.classifier = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(_DROPOUT),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(_DROPOUT),
            nn.Linear(hidden, num_classes),
        )
        self.config: dict[str, Any] = config(name, num_classes, in_channels, width=width)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [0, 1] → logits [B, num_classes]."""
        check_image(x, self.in_channels)
        return self.classifier(self.features(x).mean((2, 3)))
