"""The CIFAR ResNet: dynamic sub-network, feature extractor of the router, and static twin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, cast

from torch import Tensor, fx, nn

from awnet.nn.blocks import AWBasicBlock, AWBottleneck, Block
from awnet.nn.layers import AWConv2d, Branches, check_image

fx.wrap("check_image")  # one node where the network is traced: its branches look at shapes

BlockKind = Literal["basic", "bottleneck"]
_BLOCKS: dict[str, type[AWBasicBlock | AWBottleneck]] = {"basic": AWBasicBlock, "bottleneck": AWBottleneck}


class Backbone(nn.Module):
    """3×3 stem of stride 1, no max-pool, stages of residual blocks, global average pool, linear classifier.

    Every stage but the first halves the image, so any size from 1×1 up works. Weights start as torch's layers
    start them (Kaiming uniform), as in the CIFAR ResNets of the adversarial-training literature.

    Args:
        block: ``"basic"`` or ``"bottleneck"``.
        blocks: number of blocks of each stage.
        widths: width of each stage; the stem has the first.
        num_classes: None leaves the classifier out (a feature extractor).
        in_channels: channels of the images.
        dynamic: whether the blocks' 3×3 convolutions take filter scales.
        dynamic_shortcut: whether 1×1 shortcut convolutions do so as well.
        bn: the branches of every batch norm, see :class:`~awnet.nn.MixBatchNorm2d`.
    """

    def __init__(
        self,
        block: BlockKind,
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int | None = 10,
        in_channels: int = 3,
        dynamic: bool = True,
        dynamic_shortcut: bool = False,
        bn: Branches = "mix",
    ) -> None:
        super().__init__()
        if block not in _BLOCKS:
            raise ValueError(f"block must be one of {list(_BLOCKS)}, got {block!r}")
        if not widths or len(widths) != len(blocks) or min(*widths, *blocks) < 1:
            raise ValueError(
                f"widths and blocks need one number of at least 1 for each stage, got widths={list(widths)}, "
                f"blocks={list(blocks)}"
            )
        if in_channels < 1 or (num_classes is not None and num_classes < 1):
            raise ValueError(
                f"in_channels and num_classes must be at least 1, got in_channels={in_channels}, "
                f"num_classes={num_classes}"
            )
        make_block = _BLOCKS[block]
        self.in_channels = in_channels
        self.stem = AWConv2d(in_channels, widths[0], 3, 1, 1, dynamic=False, bn=bn)
        self.stages = nn.ModuleList()
        channels = widths[0]
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = nn.ModuleList()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(
                    make_block(
                        channels, width, stride, dynamic=dynamic, dynamic_shortcut=dynamic_shortcut, bn=bn
                    )
                )
                channels = width * make_block.expansion
            self.stages.append(stage)
        self.num_features = widths[0] + sum(width * make_block.expansion for width in widths)
        self.classifier = None if num_classes is None else nn.Linear(channels, num_classes)

    @property
    def signal_widths(self) -> list[int]:
        """C_out of each dynamic convolution, in the order in which ``filter_scales`` names them."""
        return [width for stage in self._stages() for block in stage for width in block.signal_widths]

    def _stages(self) -> Iterable[Iterable[Block]]:
        return cast("Iterable[Iterable[Block]]", self.stages)

    def features(
        self,
        x: Tensor,
        filter_scales: Sequence[Tensor] = (),
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
    ) -> list[Tensor]:
        """The outputs of the stem and of every stage, [B, C, H, W] each."""
        check_image(x, self.in_channels)
        x = self.stem(x, p_clean=p_clean, is_clean=is_clean)
        outputs = [x]
        taken = 0
        for stage in self._stages():
            for block in stage:
                own = filter_scales[taken : taken + len(block.signal_widths)]
                taken += len(block.signal_widths)
                x = block(x, own, p_clean=p_clean, is_clean=is_clean)
            outputs.append(x)
        return outputs

    def forward(
        self,
        x: Tensor,
        filter_scales: Sequence[Tensor] = (),
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
    ) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes].

        ``filter_scales`` holds ω [B, C_out] for each of ``signal_widths``, or nothing (ω ≡ 1); ``p_clean``
        [B] is for test mode, ``is_clean`` bool [B] for training mode.
        """
        if self.classifier is None:
            raise TypeError("a backbone with num_classes=None has no classifier: use features(x)")
        if filter_scales and len(filter_scales) != len(self.signal_widths):
            raise ValueError(
                f"filter_scales must hold {len(self.signal_widths)} tensors, one for each dynamic "
                f"convolution, or none; got {len(filter_scales)}"
            )
        pooled = self.features(x, filter_scales, p_clean, is_clean)[-1].mean((2, 3))  # [B, C]
        return self.classifier(pooled)
