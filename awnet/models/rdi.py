"""RDI-ResNet-38 (Hu et al., "Triple Wins", ICLR 2020): a ResNet with early exits."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from awnet.models.common import config, flops, scaled
from awnet.models.hub import OnHub
from awnet.nn import AWBasicBlock, AWConv2d
from awnet.nn.layers import check_image, check_sizes

fx.wrap("check_image")

NAMES = ("rdi_resnet38",)
_WIDTHS, _BLOCKS = (16, 32, 64), 6
_EXITS_AFTER = (1, 4)  # blocks of each group, counted from 0


class RDIResNet(nn.Module, OnHub):
    """Three groups of six basic blocks, two side exits in each group, and the final exit: seven in all.

    In eval mode the logits of a sample are those of the first exit whose entropy, divided by its maximum
    log K, is below the threshold of that exit, or else those of the final exit. The buffer ``thresholds`` [6]
    is 0 at first, so that no sample leaves early; the recipe ``rdi`` sets it by :func:`choose_thresholds`.
    All exits are computed for every sample, so that the shape of a batch does not change; :meth:`flops`
    returns the cost if samples left early. In train mode ``forward`` returns the logits of the final exit and
    :meth:`exits` those of all exits.

    ``width`` multiplies the channels of every layer.
    """

    thresholds: Tensor

    def __init__(
        self, name: str = "rdi_resnet38", num_classes: int = 10, in_channels: int = 3, *, width: float = 1.0
    ) -> None:
        if name not in NAMES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        check_sizes(num_classes, in_channels)
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        widths = [scaled(stage_width, width) for stage_width in _WIDTHS]
        self.stem = _convolution(in_channels, widths[0], 3)
        self.groups = nn.ModuleList()
        channels = widths[0]
        for i, stage_width in enumerate(widths):
            group = nn.ModuleList()
            for j in range(_BLOCKS):
                group.append(_block(channels, stage_width, 2 if i > 0 and j == 0 else 1))
                channels = stage_width
            self.groups.append(group)
        self.side_exits = nn.ModuleList(
            _side_exit(i, widths, num_classes) for i in range(len(widths)) for _ in _EXITS_AFTER
        )
        self.final_exit = nn.Sequential(*_classifier(channels, num_classes))
        self.register_buffer("thresholds", torch.zeros(len(self.side_exits)))
        self.config: dict[str, Any] = config(name, num_classes, in_channels, width=width)

    def exits(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Images [B, in_channels, H, W] in [0, 1] → the logits [B, K] of every exit, the final one last.

        ``last``: stop after this exit (the first is 0).
        """
        check_image(x, self.in_channels)
        outputs: list[Tensor] = []
        x = self.stem(x)
        for group in self.groups:
            for j, block in enumerate(cast("nn.ModuleList", group)):
                x = block(x)
                if j in _EXITS_AFTER:
                    outputs.append(self.side_exits[len(outputs)](x))
                    if last is not None and len(outputs) > last:
                        return outputs
        return [*outputs, self.final_exit(x)]

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_channels, H, W] in [0, 1] → logits [B, num_classes], see the class."""
        if self.training:
            return self.exits(x)[-1]
        logits = torch.stack(self.exits(x))  # [exits, B, K]
        return logits[self._exit_of(logits), torch.arange(x.shape[0], device=x.device)]

    def exit_of(self, x: Tensor) -> Tensor:
        """The exit that each image takes in eval mode, int64 [B], 0 to 6."""
        return self._exit_of(torch.stack(self.exits(x)))

    def _exit_of(self, logits: Tensor) -> Tensor:
        below_threshold = entropy(logits[:-1].detach()) < self.thresholds[:, None]  # [exits - 1, B]
        final = torch.ones_like(below_threshold[:1])
        return torch.cat([below_threshold, final]).int().argmax(0)  # the first

    def flops(self, image_size: tuple[int, int] = (32, 32)) -> list[int]:
        """Floating-point operations of an image that leaves at each exit: the layers before it, and all
        exits up to it."""
        network = copy.deepcopy(self).to("meta").eval()
        x = torch.zeros(1, self.in_channels, *image_size, device="meta")
        return [
            flops(network, lambda last=last: network.exits(x, last))  # type: ignore[misc]
            for last in range(len(self.side_exits) + 1)
        ]


def has_exits(model: nn.Module) -> bool:
    """Whether ``model`` has side exits: an RDI-ResNet, or a network with its interface.

    The interface is ``exits(x)``, ``exit_of(x)`` and ``flops(image_size)``, all three.
    """
    return all(callable(getattr(model, name, None)) for name in ("exits", "exit_of", "flops"))


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) [..., K] divided by its maximum log K: [...], in [0, 1]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(max(logits.shape[-1], 2))


def choose_thresholds(logits: Tensor, y: Tensor) -> Tensor:
    """Thresholds [exits - 1] at which samples leave as early as possible without loss of accuracy.

    The exits are handled in order. Of the samples that reach an exit, as many as possible leave, those with
    the lowest entropy first, provided that this exit classifies them as accurately as the final one.

    Args:
        logits: of held-out images at every exit, [exits, N, K].
        y: labels, int64 [N].
    """
    entropies = entropy(logits).cpu()  # [exits, N]
    correct = (logits.argmax(-1) == y).long().cpu()
    thresholds = torch.zeros(len(logits) - 1, dtype=logits.dtype)
    remaining = torch.arange(len(y))
    for e in range(len(thresholds)):
        values, order = entropies[e, remaining].sort(stable=True)
        gain = (correct[e, remaining] - correct[-1, remaining])[order].cumsum(0)
        following = torch.cat([values[1:], values.new_full((1,), torch.inf)])
        # a threshold can only separate two samples of different entropy
        possible = ((gain >= 0) & (values < following)).nonzero().flatten()
        if len(possible):
            number = int(possible[-1]) + 1
            thresholds[e] = (values[number - 1] + following[number - 1].clamp(max=1.1)) / 2
        remaining = remaining[entropies[e, remaining] >= thresholds[e]]
    return thresholds


def _convolution(in_channels: int, width: int, size: int, *, relu: bool = True) -> AWConv2d:
    return AWConv2d(
        in_channels,
        width,
        size,
        padding=size // 2,
        dynamic=False,
        activation="relu" if relu else None,
        bn="one",
    )


def _block(in_channels: int, width: int, stride: int = 1) -> AWBasicBlock:
    return AWBasicBlock(in_channels, width, stride, dynamic=False, bn="one")


def _classifier(channels: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def _side_exit(group: int, widths: list[int], num_classes: int) -> nn.Sequential:
    """Two convolutions in the first group, a block in the second, only a linear layer in the third."""
    narrow, middle, wide = widths
    if group == 0:
        layers: list[nn.Module] = [
            _halved(),
            _convolution(narrow, wide, 5),
            _halved(),
            _convolution(wide, middle, 3, relu=False),
            *_classifier(middle, num_classes),
        ]
    elif group == 1:
        layers = [_halved(), _block(middle, middle), *_classifier(middle, num_classes)]
    else:
        layers = _classifier(wide, num_classes)
    return nn.Sequential(*layers)


def _halved() -> nn.MaxPool2d:
    return nn.MaxPool2d(2, ceil_mode=True)  # odd sizes are rounded up, so that any image works
