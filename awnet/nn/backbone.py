"""Networks of blocks, dynamic or static: CIFAR ResNet, WideResNet and MobileNet-v2.

The ResNet is also the feature extractor of the router.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, fx, nn

from awnet.nn.blocks import AWBasicBlock, AWBottleneck, AWInvertedResidual, AWPreActivationBlock, Block
from awnet.nn.layers import Activation, AWConv2d, Branches, MixBatchNorm2d, check_image, check_sizes
from awnet.ops import global_average
from awnet.ops.running_statistics import with_joint_updates
from awnet.reference import activated
from awnet.scalars import check_integers

fx.wrap("check_image")  # one node in a traced network, since it branches on shapes
fx.wrap("global_average")

BlockKind = Literal["basic", "bottleneck"]
X = TypeVar("X")
_BLOCKS: dict[str, type[AWBasicBlock | AWBottleneck]] = {"basic": AWBasicBlock, "bottleneck": AWBottleneck}


class BlockNetwork(nn.Module):
    """Stem, stages of blocks, layers after the last block, global average pool, linear classifier.

    A subclass sets ``stem``, ``stages`` and ``classifier``.
    """

    stem: nn.Module
    stages: nn.ModuleList
    classifier: nn.Linear | None

    def __init__(self, num_classes: int | None, in_channels: int, widths: Sequence[int]) -> None:
        super().__init__()
        check_sizes(1 if num_classes is None else num_classes, in_channels)
        if not check_integers("widths", widths, 1):
            raise ValueError("widths must have a number for each stage, got none")
        self.in_channels = in_channels

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
        used = 0

        def apply(block: Block, x: Tensor) -> Tensor:
            nonlocal used
            scales = filter_scales[used : used + len(block.signal_widths)]
            used += len(scales)
            return block(x, scales, p_clean=p_clean, is_clean=is_clean)

        return self.run(apply, self._first(x, p_clean, is_clean))

    def run(self, apply: Callable[[Block, X], X], x: X) -> list[X]:
        """The outputs of the stem, ``x``, and of every stage, where ``apply(block, x)`` runs one block."""
        outputs = [x]
        for stage in self._stages():
            for block in stage:
                x = apply(block, x)
            outputs.append(x)
        return outputs

    @with_joint_updates
    def forward(
        self,
        x: Tensor,
        filter_scales: Sequence[Tensor] = (),
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
    ) -> Tensor:
        """Images [B, in_channels, H, W] → logits [B, num_classes].

        ``filter_scales`` holds ω [B, C_out] for each of ``signal_widths``, or nothing (ω ≡ 1); ``p_clean``
        [B] is for eval mode, ``is_clean`` bool [B] for train mode.
        """
        if self.classifier is None:
            raise TypeError("a backbone with num_classes=None has no classifier: use features(x)")
        if filter_scales and len(filter_scales) != len(self.signal_widths):
            raise ValueError(
                f"filter_scales must hold {len(self.signal_widths)} tensors, one for each dynamic "
                f"convolution, or none; got {len(filter_scales)}"
            )
        last = self.features(x, filter_scales, p_clean, is_clean)[-1]
        pooled = global_average(self._last(last, p_clean, is_clean))
        return self.classifier(pooled)

    def _first(self, x: Tensor, p_clean: Tensor | None, is_clean: Tensor | None) -> Tensor:
        """Before the first block."""
        return self.stem(x, p_clean=p_clean, is_clean=is_clean)

    def _last(self, x: Tensor, p_clean: Tensor | None, is_clean: Tensor | None) -> Tensor:
        """After the last block, before the pool."""
        return x


class Backbone(BlockNetwork):
    """3×3 stem of stride 1, no max-pool, stages of residual blocks, global average pool, linear classifier.

    Every stage but the first halves the image, so any size from 1×1 works. Weights are initialized by torch's
    defaults (Kaiming uniform), as in the CIFAR ResNets of the literature on adversarial training.

    Args:
        block: ``"basic"`` or ``"bottleneck"``.
        blocks: number of blocks of each stage.
        widths: width of each stage; the stem has the first.
        num_classes: None omits the classifier (a feature extractor).
        in_channels: channels of the images.
        dynamic: whether the blocks' 3×3 convolutions take filter scales.
        dynamic_shortcut: whether 1×1 shortcut convolutions take them too.
        bn: the branches of every batch norm, see :class:`~awnet.nn.MixBatchNorm2d`.
        activation: replaces every ReLU, see :class:`~awnet.nn.AWConv2d`.
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
        activation: Activation = "relu",
    ) -> None:
        if block not in _BLOCKS:
            raise ValueError(f"block must be one of {list(_BLOCKS)}, got {block!r}")
        widths, blocks = check_integers("widths", widths, 1), check_integers("blocks", blocks, 1)
        if not widths or len(widths) != len(blocks):
            raise ValueError(
                f"widths and blocks need one number of at least 1 for each stage, got widths={list(widths)}, "
                f"blocks={list(blocks)}"
            )
        super().__init__(num_classes, in_channels, widths)
        make_block = _BLOCKS[block]
        self.stem = AWConv2d(in_channels, widths[0], 3, 1, 1, dynamic=False, bn=bn, activation=activation)
        options: dict[str, Any] = {"dynamic": dynamic, "dynamic_shortcut": dynamic_shortcut}
        options |= {"bn": bn, "activation": activation}
        self.stages, channels = _stages(make_block, widths[0], widths, blocks, options)
        self.num_features = widths[0] + sum(width * make_block.expansion for width in widths)
        self.classifier = None if num_classes is None else nn.Linear(channels, num_classes)


def _stages(
    block: type[AWBasicBlock | AWBottleneck | AWPreActivationBlock],
    channels: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    options: Mapping[str, Any],
) -> tuple[nn.ModuleList, int]:
    """The stages and their output channels; every stage but the first halves the image.

    Args:
        channels: of the input.
        widths, blocks: of each stage.
        options: further arguments of every block.
    """
    stages = nn.ModuleList()
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        stage = nn.ModuleList()
        for j in range(count):
            stage.append(block(channels, width, 2 if i > 0 and j == 0 else 1, **options))
            channels = width * block.expansion
        stages.append(stage)
    return stages, channels


class WideBackbone(BlockNetwork):
    """WideResNet (Zagoruyko and Komodakis, 2016): three stages of pre-activation blocks.

    A 3×3 stem without batch norm, batch norm and ReLU after the last block; every stage but the first halves
    the image. The depth is 6·n + 4 with n blocks per stage. :class:`~awnet.nn.AWPreActivationBlock` describes
    how the layers of AW-Net are used.

    Args:
        blocks: number of blocks of each stage, n.
        stem_width, widths: channels of the stem (16) and of the stages (16·k, 32·k, 64·k).
        num_classes, in_channels, dynamic, dynamic_shortcut, bn, activation: as in :class:`Backbone`.
    """

    def __init__(
        self,
        blocks: int,
        stem_width: int,
        widths: Sequence[int],
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        dynamic: bool = True,
        dynamic_shortcut: bool = False,
        bn: Branches = "mix",
        activation: Activation = "relu",
    ) -> None:
        super().__init__(num_classes, in_channels, [stem_width, *widths])
        self.activation = activation
        self.stem = nn.Conv2d(in_channels, stem_width, 3, 1, 1, bias=False)
        options: dict[str, Any] = {"dynamic": dynamic, "dynamic_shortcut": dynamic_shortcut}
        options |= {"bn": bn, "activation": activation}
        counts = [blocks] * len(widths)
        self.stages, channels = _stages(AWPreActivationBlock, stem_width, widths, counts, options)
        self.norm = MixBatchNorm2d(channels, branches=bn)
        self.classifier = nn.Linear(channels, num_classes)

    def _first(self, x: Tensor, p_clean: Tensor | None, is_clean: Tensor | None) -> Tensor:
        return self.stem(x)

    def _last(self, x: Tensor, p_clean: Tensor | None, is_clean: Tensor | None) -> Tensor:
        return activated(self.norm(x, p_clean=p_clean, is_clean=is_clean), self.activation)


class MobileBackbone(BlockNetwork):
    """MobileNet-v2 (Sandler et al., 2018) for small images: stem and second stage keep the image's size.

    Args:
        settings: (expansion, width, blocks, stride) of each stage.
        stem_width, head_width: channels of the stem (32) and of the last 1×1 convolution (1280).
        num_classes, in_channels, dynamic, bn: see :class:`Backbone`; the depthwise convolutions are dynamic.
    """

    def __init__(
        self,
        settings: Sequence[tuple[int, int, int, int]],
        stem_width: int,
        head_width: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        dynamic: bool = True,
        bn: Branches = "mix",
    ) -> None:
        widths = [width for _, width, _, _ in settings]
        super().__init__(num_classes, in_channels, [stem_width, *widths, head_width])
        self.stem = AWConv2d(in_channels, stem_width, 3, 1, 1, dynamic=False, bn=bn)
        self.stages = nn.ModuleList()
        channels = stem_width
        for expansion, width, blocks, stride in settings:
            stage = nn.ModuleList()
            for j in range(blocks):
                stage.append(
                    AWInvertedResidual(
                        channels, width, stride if j == 0 else 1, expansion, dynamic=dynamic, bn=bn
                    )
                )
                channels = width
            self.stages.append(stage)
        self.head = AWConv2d(channels, head_width, 1, dynamic=False, bn=bn)
        self.classifier = nn.Linear(head_width, num_classes)

    def _first(self, x: Tensor, p_clean: Tensor | None, is_clean: Tensor | None) -> Tensor:
        return self.stem(x, p_clean=p_clean, is_clean=is_clean).clamp(max=6)  # with the layer's ReLU: ReLU6

    def _last(self, x: Tensor, p_clean: Tensor | None, is_clean: Tensor | None) -> Tensor:
        return self.head(x, p_clean=p_clean, is_clean=is_clean).clamp(max=6)
