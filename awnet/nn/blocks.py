"""Residual blocks of Eq. 16, and their counterparts in WideResNet and MobileNet-v2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict, TypeVar

from torch import Tensor, nn

from awnet.nn.layers import Activation, AWConv2d, Branches, FilterScaledConv2d, MixBatchNorm2d
from awnet.reference import activated

X = TypeVar("X")


class LayerOptions(TypedDict):
    """Options that all layers of a block with an activation share."""

    bn: Branches
    activation: Activation


def is_dynamic(layer: nn.Module) -> bool:
    """Whether ``layer`` is a convolution that takes filter scales."""
    return isinstance(layer, FilterScaledConv2d) and getattr(layer, "dynamic", True)


class Block(nn.Module):
    """Base class of blocks: which of their convolutions are dynamic, and in which order."""

    def convolutions(self) -> Sequence[nn.Conv2d]:
        """All convolutions; the dynamic ones among them take ``filter_scales`` in this order."""
        raise NotImplementedError

    @property
    def signal_widths(self) -> list[int]:
        """C_out of each dynamic convolution, in order."""
        return [layer.out_channels for layer in self.convolutions() if is_dynamic(layer)]

    def _scales_per_convolution(self, filter_scales: Sequence[Tensor]) -> list[Tensor | None]:
        """One entry for each convolution: its ω, or None for ω ≡ 1 and for static convolutions."""
        layers = self.convolutions()
        if not filter_scales:
            return [None] * len(layers)
        if len(filter_scales) != len(self.signal_widths):
            raise ValueError(
                f"filter_scales must hold {len(self.signal_widths)} tensors [B, C_out], one for each dynamic "
                f"convolution (widths {self.signal_widths}), or none; got {len(filter_scales)}"
            )
        remaining = iter(filter_scales)
        return [next(remaining) if is_dynamic(layer) else None for layer in layers]

    def forward(
        self,
        input: Tensor,
        filter_scales: Sequence[Tensor] = (),
        *,
        p_clean: Tensor | None = None,
        is_clean: Tensor | None = None,
    ) -> Tensor:
        """``input`` [B, C_in, H, W] → [B, C_out, H/stride, W/stride].

        ``filter_scales`` has one ω [B, width] for each of ``signal_widths``, or is empty (ω ≡ 1). ValueError
        for another number of them.
        """
        return self._apply_layers(
            input, self._scales_per_convolution(filter_scales), {"p_clean": p_clean, "is_clean": is_clean}
        )

    def _apply_layers(
        self, input: Tensor, scales: Sequence[Tensor | None], branch: Mapping[str, Tensor | None]
    ) -> Tensor:
        """``scales`` has an entry for each convolution; ``branch`` holds p_clean and is_clean."""
        raise NotImplementedError


class ResidualBlock(Block):
    """Base class of :class:`AWBasicBlock` and :class:`AWBottleneck`: convolutions and a shortcut.

    The shortcut is the identity, or a 1×1 convolution with MixBN if the shape changes, static unless
    ``dynamic_shortcut``. ``activation`` takes the place of the ReLU, see :class:`AWConv2d`.
    """

    expansion: int
    shortcut: AWConv2d | None

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        *,
        dynamic: bool = True,
        dynamic_shortcut: bool = False,
        bn: Branches = "mix",
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self._add_convolutions(in_channels, width, stride, dynamic, {"bn": bn, "activation": activation})
        out_channels = self.expansion * width
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

    def _add_convolutions(
        self, in_channels: int, width: int, stride: int, dynamic: bool, options: LayerOptions
    ) -> None:
        """Creates the convolutions of the block, except the shortcut."""
        raise NotImplementedError

    def run(self, apply: Callable[[int, X, X | None], X], input: X) -> X:
        """The block on ``input``, where ``apply(i, input, residual)`` runs the i-th of ``convolutions``.

        ``forward`` applies the layers to tensors; an inference copy records their connections.
        """
        count = len(self.convolutions())
        residual = input
        if self.shortcut is not None:  # the last of the convolutions
            count -= 1
            residual = apply(count, input, None)
        for i in range(count - 1):
            input = apply(i, input, None)
        return apply(count - 1, input, residual)

    def _apply_layers(
        self, input: Tensor, scales: Sequence[Tensor | None], branch: Mapping[str, Tensor | None]
    ) -> Tensor:
        layers = self.convolutions()
        return self.run(lambda i, x, residual: layers[i](x, scales[i], residual=residual, **branch), input)


class AWBasicBlock(ResidualBlock):
    """Two dynamic 3×3 convolutions and a shortcut, Eq. 16: φ = relu(F₂(relu(F₁(ψ))) + shortcut(ψ)).

    The options are those of :class:`ResidualBlock`. ``dynamic=False, bn="one"`` is the ordinary basic block.
    """

    expansion = 1

    def _add_convolutions(
        self, in_channels: int, width: int, stride: int, dynamic: bool, options: LayerOptions
    ) -> None:
        self.conv1 = AWConv2d(in_channels, width, 3, stride, 1, dynamic=dynamic, **options)
        self.conv2 = AWConv2d(width, width, 3, 1, 1, dynamic=dynamic, **options)

    def convolutions(self) -> list[AWConv2d]:
        return [self.conv1, self.conv2, *([self.shortcut] if self.shortcut is not None else [])]


class AWBottleneck(ResidualBlock):
    """1×1 → 3×3 → 1×1 with a shortcut; the 3×3 convolution is dynamic, the 1×1 ones are static.

    Gives ``4 * width`` channels. The options are those of :class:`ResidualBlock`.
    """

    expansion = 4

    def _add_convolutions(
        self, in_channels: int, width: int, stride: int, dynamic: bool, options: LayerOptions
    ) -> None:
        self.conv1 = AWConv2d(in_channels, width, 1, dynamic=False, **options)
        self.conv2 = AWConv2d(width, width, 3, stride, 1, dynamic=dynamic, **options)
        self.conv3 = AWConv2d(width, self.expansion * width, 1, dynamic=False, **options)

    def convolutions(self) -> list[AWConv2d]:
        return [self.conv1, self.conv2, self.conv3, *([self.shortcut] if self.shortcut is not None else [])]


class AWPreActivationBlock(Block):
    """WideResNet's block, BN → ReLU → conv twice and a shortcut, with dynamic 3×3 convolutions.

    AW-Net's layer is conv → MixBN → ReLU. So the first convolution with the batch norm and ReLU that follow
    it is one fused call. No batch norm follows the second convolution: its output is added to the shortcut,
    and the MixBN of the next block normalizes the sum.

    Where the shape changes, a 1×1 convolution of the activated input is the shortcut.
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
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.norm = MixBatchNorm2d(in_channels, branches=bn)
        self.conv1 = AWConv2d(in_channels, width, 3, stride, 1, dynamic=dynamic, bn=bn, activation=activation)
        self.conv2 = _convolution(dynamic)(width, width, 3, 1, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != width:
            make = _convolution(dynamic and dynamic_shortcut)
            self.shortcut = make(in_channels, width, 1, stride, bias=False)

    def convolutions(self) -> list[nn.Conv2d]:
        return [self.conv1, self.conv2, *([self.shortcut] if self.shortcut is not None else [])]

    def _apply_layers(
        self, input: Tensor, scales: Sequence[Tensor | None], branch: Mapping[str, Tensor | None]
    ) -> Tensor:
        active = activated(self.norm(input, **branch), self.activation)
        hidden = self.conv1(active, scales[0], **branch)
        residual = input if self.shortcut is None else _convolve(self.shortcut, active, scales[2])
        return residual + _convolve(self.conv2, hidden, scales[1])


def _convolution(dynamic: bool) -> type[nn.Conv2d]:
    return FilterScaledConv2d if dynamic else nn.Conv2d


def _convolve(layer: nn.Conv2d, input: Tensor, filter_scale: Tensor | None) -> Tensor:
    return layer(input, filter_scale) if isinstance(layer, FilterScaledConv2d) else layer(input)


class AWInvertedResidual(Block):
    """MobileNet-v2's block: 1×1 expansion → depthwise 3×3 → 1×1 projection, without ReLU at the end.

    The depthwise convolution is dynamic, the 1×1 ones are static, as in :class:`AWBottleneck`. The input is
    added if the shape does not change. ReLU6 is the fused layer's ReLU and a clamp.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int = 1,
        expansion: int = 6,
        *,
        dynamic: bool = True,
        bn: Branches = "mix",
    ) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.expand = None
        if expansion != 1:
            self.expand = AWConv2d(in_channels, hidden, 1, dynamic=False, bn=bn)
        self.depthwise = AWConv2d(hidden, hidden, 3, stride, 1, groups=hidden, dynamic=dynamic, bn=bn)
        self.project = AWConv2d(hidden, width, 1, dynamic=False, activation=None, bn=bn)
        self.adds_input = stride == 1 and in_channels == width

    def convolutions(self) -> list[AWConv2d]:
        return [*([self.expand] if self.expand is not None else []), self.depthwise, self.project]

    def _apply_layers(
        self, input: Tensor, scales: Sequence[Tensor | None], branch: Mapping[str, Tensor | None]
    ) -> Tensor:
        hidden = input if self.expand is None else self.expand(input, **branch).clamp(max=6)
        hidden = self.depthwise(hidden, scales[-2], **branch).clamp(max=6)
        return self.project(hidden, residual=input if self.adds_input else None, **branch)
