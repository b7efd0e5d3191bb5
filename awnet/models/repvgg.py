"""RepVGG-A2 (Ding et al., 2021) for small images: three branches in training, one convolution afterwards."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from awnet.models.common import WithInferenceCopy, config, scaled
from awnet.models.hub import OnHub
from awnet.nn.inference import PlainInferenceCopy, register_inference_copy, register_layers
from awnet.nn.layers import AWConv2d, MixBatchNorm2d, check_image, check_sizes
from awnet.scalars import check_flag

fx.wrap("check_image")

NAMES = ("repvgg_a2",)
_STAGES = ((64, 1), (96, 2), (192, 4), (384, 14), (1408, 1))  # width, blocks
_STRIDES = (1, 1, 2, 2, 2)  # of the stem and the stages; 2 everywhere in the original


class RepVGGBlock(nn.Module):
    """relu(BN(conv3×3(x)) + BN(conv1×1(x)) + BN(x)), without BN(x) if the shape changes; two fused calls."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv3 = AWConv2d(in_channels, width, 3, stride, 1, dynamic=False, bn="one")
        self.conv1 = AWConv2d(in_channels, width, 1, stride, dynamic=False, activation=None, bn="one")
        keeps_shape = stride == 1 and in_channels == width
        self.identity = MixBatchNorm2d(width, branches="one") if keeps_shape else None

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [B, C_in, H, W] → [B, width, H/stride, W/stride]."""
        residual = None if self.identity is None else self.identity(input)
        return self.conv3(input, residual=self.conv1(input, residual=residual))

    @torch.no_grad()
    def fused(self) -> FusedBlock:
        """The single convolution that computes the same in eval mode.

        A batch norm with running statistics is an affine map of each channel, γ/σ·u + (β − μγ/σ), and is
        folded into its convolution. A 1×1 kernel and the identity are 3×3 kernels with zeros around the
        center. The three kernels are added.
        """
        weight, bias = _folded(self.conv3.weight, self.conv3.bn)
        point, shift = _folded(self.conv1.weight, self.conv1.bn)
        weight, bias = weight + F.pad(point, (1, 1, 1, 1)), bias + shift
        if self.identity is not None:
            eye = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)[:, :, None, None]
            point, shift = _folded(eye, self.identity)
            weight, bias = weight + F.pad(point, (1, 1, 1, 1)), bias + shift
        block = FusedBlock(self.conv3.in_channels, self.conv3.out_channels, int(self.conv3.stride[0])).to(
            weight
        )
        block.conv.weight.copy_(weight)
        assert block.conv.bias is not None
        block.conv.bias.copy_(bias)
        return block


def _folded(weight: Tensor, norm: MixBatchNorm2d) -> tuple[Tensor, Tensor]:
    """Kernel [C_out, C_in, k, k] and bias [C_out] of a convolution followed by ``norm`` in eval mode."""
    factor = norm.weight[0] * (norm.running_var[0] + norm.eps).rsqrt()
    return weight * factor[:, None, None, None], norm.bias[0] - norm.running_mean[0] * factor


class FusedBlock(nn.Module):
    """relu(conv3×3(x)): a :class:`RepVGGBlock` in eval mode after re-parameterization."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, stride, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.conv(input))


register_layers(RepVGGBlock, FusedBlock)


@register_inference_copy(PlainInferenceCopy)
class RepVGG(WithInferenceCopy, OnHub):
    """RepVGG-A2, with stem and first stage of stride 1.

    ``width`` multiplies the channels of every layer. ``fused=True`` is the re-parameterized form, with one
    3×3 convolution per block and no batch norm; :meth:`fused` converts a trained network to it.
    """

    def __init__(
        self,
        name: str = "repvgg_a2",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        fused: bool = False,
    ) -> None:
        if name not in NAMES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        check_sizes(num_classes, in_channels)
        fused = check_flag("fused", fused)
        super().__init__()
        self.in_channels = in_channels
        make = FusedBlock if fused else RepVGGBlock
        self.blocks = nn.Sequential()
        channels = in_channels
        for (stage_width, blocks), stride in zip(_STAGES, _STRIDES, strict=True):
            for i in range(blocks):
                self.blocks.append(make(channels, scaled(stage_width, width), stride if i == 0 else 1))
                channels = scaled(stage_width, width)
        self.classifier = nn.Linear(channels, num_classes)
        self.config: dict[str, Any] = config(name, num_classes, in_channels, width=width, fused=fused)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [0, 1] → logits [B, num_classes]."""
        check_image(x, self.in_channels)
        return self.classifier(self.blocks(x).mean((2, 3)))

    def fused(self) -> RepVGG:
        """A new network with one convolution per block, in eval mode, with the same eval-mode logits.

        Raises ValueError if the network is fused already.
        """
        if self.config["options"]["fused"]:
            raise ValueError("the network is in its fused form already")
        with torch.device("meta"):
            network = RepVGG(
                self.config["name"],
                self.config["num_classes"],
                self.in_channels,
                width=self.config["options"]["width"],
                fused=True,
            )
        network.blocks = nn.Sequential(*(block.fused() for block in self.blocks))  # type: ignore[operator]
        network.classifier = copy.deepcopy(self.classifier)
        return network.eval()
