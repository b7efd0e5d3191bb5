"""Swin transformers (Liu et al., 2021) for small images, from timm, an optional extra."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from awnet.models.common import config, optional_module, scaled
from awnet.models.hub import OnHub
from awnet.nn.layers import check_image, check_sizes
from awnet.scalars import check_integer

_DEPTHS = {"swin_t": (2, 2, 6, 2), "swin_s": (2, 2, 18, 2)}
NAMES = tuple(_DEPTHS)
_HEADS = (3, 6, 12, 24)
_HEAD_WIDTH = 32


class Swin(nn.Module, OnHub):
    """Swin-T or Swin-S with patches of 2×2 and windows of 4×4, as Mo et al. (2022) train it on CIFAR.

    Args:
        name: ``swin_t`` or ``swin_s``.
        num_classes, in_channels: K and C.
        width: multiplies the width of the attention heads (32), and so of all layers.
        image_size: side of the images; the network takes this size only.

    Raises ImportError if timm is not installed, or its torchvision was built for another torch.
    """

    def __init__(
        self,
        name: str = "swin_t",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        image_size: int = 32,
    ) -> None:
        if name not in _DEPTHS:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        check_sizes(num_classes, in_channels)
        image_size = check_integer("image_size", image_size, 1)
        timm = optional_module("timm.models.swin_transformer", '"awnet[timm]"', name)
        super().__init__()
        self.in_channels, self.image_size = in_channels, image_size
        self.network: nn.Module = timm.SwinTransformer(
            img_size=image_size,
            patch_size=2,
            window_size=4,
            in_chans=in_channels,
            num_classes=num_classes,
            embed_dim=_HEADS[0] * scaled(_HEAD_WIDTH, width),
            depths=_DEPTHS[name],
            num_heads=_HEADS,
        )
        self.config: dict[str, Any] = config(
            name, num_classes, in_channels, width=width, image_size=image_size
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, image_size, image_size] in [0, 1] → logits [B, num_classes]."""
        check_image(x, self.in_channels)
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"x must be {self.image_size}×{self.image_size} images, got {x.shape[2]}×{x.shape[3]}: "
                "create the model with other image_size"
            )
        return self.network(x)
