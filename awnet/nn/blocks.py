"""Residual blocks of Eq. 16: the shortcut is added inside the last convolution's fused call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from awnet.nn.layers import AWConv2d, Branches


class Block(nn.Module):
    """What the two kinds of block share: which of their convolutions are dynamic, and in which order."""

    shortcut: AWConv2d | None

    def convolutions(self) -> list[AWConv2d]:
        """All convolutions; the dynamic ones among them take ``filter_scales`` in this order."""
        raise NotImplementedError

    @property
    def signal_widths(self) -> list[int]:
        """C_out of each dynamic convolution, in order."""
        return [layer.out_channels for layer in self.convolutions() if layer.dynamic]

    def _spread(self, filter_scales: Sequence[Tensor]) -> list[Tensor | None]:
        """One entry for each convolution: its ω, or None where it is static or no ω came (ω ≡ 1)."""
        layers = self.convolutions()
        if not filter_scales:
            return [None] * len(layers)
        if len(filter_scales) != len(self.signal_widths):
            raise ValueError(
                f"filter_scales must hold {len(self.signal_widths)} tensors [B, C_out], one for each dynamic "
                f"convolution (widths {self.signal_widths}), or none; got {len(filter_scales)}"
            )
        remaining = iter(filter_scales)
        return [next(remaining) if layer.dynamic else None for layer in layers]


class AWBasicBlock(Block):
    """Two dynamic 3×3 convolutions and a shortcut, Eq. 16: φ = relu(F₂(relu(F₁(ψ))) + shortcut(ψ)).

    The shortcut is the identity, or a 1×1 convolution with MixBN where the shape changes, static unless
    ``dynamic_shortcut``. ``dynamic=False, bn="one"`` is the ordinary basic block.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        dynamic: bool = True,
        dynamic_shortcut: bool = False,
        bn: Branches = "mix",
    ) -> None:
        super().__init__()
        self.conv1 = AWConv2d(in_channels, width, 3, stride, 1, dynamic=dynamic, bn=bn)
        self.conv2 = AWConv2d(width, width, 3, 1, 1, dynamic=dynamic, bn=bn)
        self.shortcut = None
        if stride != 1 or in_channels != width:
            self.shortcut = AWConv2d(
                in_channels, width, 1, stride, dynamic=dynamic and dynamic_shortcut, activation=None, bn=bn
            )

    def convolutions(self) -> list[AWConv2d]:
        return [self.conv1, self.conv2, *([self.shortcut] if self.shortcut is not None else [])]

    def forward(
        self,
        input: Tensor,
        filter_scales: Sequence[Tensor] = (),
        *,
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
    ) -> Tensor:
        """``input`` [B, C_in, H, W] → [B, width, H/stride, W/stride]; one ω for each of ``signal_widths``."""
        scale = self._spread(filter_scales)
        residual = input
        if self.shortcut is not None:
            residual = self.shortcut(input, scale[2], p_clean=p_clean, is_clean=is_clean)
        hidden = self.conv1(input, scale[0], p_clean=p_clean, is_clean=is_clean)
        return self.conv2(hidden, scale[1], p_clean=p_clean, is_clean=is_clean, residual=residual)


class AWBottleneck(Block):
    """1×1 → 3×3 → 1×1 with a shortcut; the 3×3 convolution is dynamic, the 1×1 ones are static.

    Gives ``4 * width`` channels. The options are those of :class:`AWBasicBlock`.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        dynamic: bool = True,
        dynamic_shortcut: bool = False,
        bn: Branches = "mix",
    ) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = AWConv2d(in_channels, width, 1, dynamic=False, bn=bn)
        self.conv2 = AWConv2d(width, width, 3, stride, 1, dynamic=dynamic, bn=bn)
        self.conv3 = AWConv2d(width, out_channels, 1, dynamic=False, bn=bn)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = AWConv2d(
                in_channels,
                out_channels,
                1,
                stride,
                dynamic=dynamic and dynamic_shortcut,
                activation=None,
                bn=bn,
            )

    def convolutions(self) -> list[AWConv2d]:
        return [self.conv1, self.conv2, self.conv3, *([self.shortcut] if self.shortcut is not None else [])]

    def forward(
        self,
        input: Tensor,
        filter_scales: Sequence[Tensor] = (),
        *,
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
    ) -> Tensor:
        """``input`` [B, C_in, H, W] → [B, 4·width, H/stride, W/stride]."""
        scale = self._spread(filter_scales)
        residual = input
        if self.shortcut is not None:
            residual = self.shortcut(input, scale[3], p_clean=p_clean, is_clean=is_clean)
        hidden = self.conv1(input, p_clean=p_clean, is_clean=is_clean)
        hidden = self.conv2(hidden, scale[1], p_clean=p_clean, is_clean=is_clean)
        return self.conv3(hidden, p_clean=p_clean, is_clean=is_clean, residual=residual)
