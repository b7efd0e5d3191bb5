"""Separate-Net (Section 5.2.2 of the paper): a standard network, a robust one, and a detector.

``mixed_net`` is output mixing by the same parts, as in adaptive smoothing (Bai et al., "Improving the
Accuracy-Robustness Trade-off of Classifiers via Adaptive Smoothing", 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from awnet.models.common import WithInferenceCopy, checked_router_widths, config
from awnet.models.hub import OnHub
from awnet.models.mobilenet import MobileNetV2
from awnet.models.resnet import ResNet
from awnet.nn import AdversarialRouter, RoutedNetwork, Routing
from awnet.nn.inference import PlainInferenceCopy, register_inference_copy
from awnet.scalars import check_number

_ROBUST = {"separate_net": "resnet18", "separate_net_l": "resnet34", "mixed_net": "resnet18"}
NAMES = tuple(_ROBUST)
_ROUTER_WIDTHS = (64, 128, 256, 512)

Gate = Literal["hard", "soft", "standard", "robust", "mixed"]


@register_inference_copy(PlainInferenceCopy)
class SeparateNet(RoutedNetwork, WithInferenceCopy, OnHub):
    """Two networks, one for clean and one for adversarial images, and AW-Net's router as the detector.

    In eval mode an image with ``p_clean`` above ``threshold`` gets the logits of the standard member, a
    MobileNet-v2, any other image those of the robust member, a ResNet-18 (ResNet-34 for ``separate_net_l``).
    In train mode ``is_clean`` sends each sample to the member of its kind, so every recipe for AW-Nets can
    train it; the recipe ``separate`` trains each part separately, as in the paper.

    The hard choice has no gradient for the detector. For attacks :meth:`with_gate` returns the same network
    with another gate: ``"soft"`` mixes both members' logits by ``p_clean``, ``"standard"`` and ``"robust"``
    force a member. ``"mixed"``, the gate of ``mixed_net``, mixes their probabilities: logits =
    log(p σ(standard) + (1 - p) σ(robust)) with σ the softmax.

    Args:
        name: ``separate_net``, ``separate_net_l`` or ``mixed_net``.
        num_classes, in_channels: K and C.
        width: multiplies the channels of every layer in all three networks.
        threshold: on ``p_clean``, in [0, 1].
        router_widths: widths of the detector's stages; those of ResNet-18 times ``width`` by default.
    """

    def __init__(
        self,
        name: str = "separate_net",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        threshold: float = 0.5,
        router_widths: Sequence[int] | None = None,
    ) -> None:
        if name not in _ROBUST:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        threshold = check_number("threshold", threshold, 0, 1)
        super().__init__()
        widths = checked_router_widths(router_widths, _ROUTER_WIDTHS, width)
        self.standard = MobileNetV2("mobilenet_v2", num_classes, in_channels, width=width)
        self.robust = ResNet(_ROBUST[name], num_classes, in_channels, width=width)
        self.router = AdversarialRouter([], in_channels=in_channels, widths=widths)
        self.threshold = threshold
        self.gate: Gate = "mixed" if name == "mixed_net" else "hard"
        self.config: dict[str, Any] = config(
            name, num_classes, in_channels, width=width, threshold=threshold, router_widths=list(widths)
        )

    def with_gate(self, gate: Gate) -> Self:
        """This network with another gate in eval mode; weights and mode are shared."""
        if gate not in get_args(Gate):
            raise ValueError(f"gate must be one of {list(get_args(Gate))}, got {gate!r}")
        view = copy.copy(self)
        view.gate = gate
        return view

    def route(self, x: Tensor) -> Routing:
        """The output of the detector for images [B, C, H, W]; there are no filter scales."""
        return self.router(x)

    def forward(self, x: Tensor, *, is_clean: Tensor | None = None, routing: Routing | None = None) -> Tensor:
        """Images [B, C, H, W] in [0, 1] → logits [B, K]; arguments and errors as of an AW-Net."""
        is_clean, routing = self._steered(x, is_clean, routing)
        self._check_is_clean(is_clean, x, needed=True, decider="detector")
        if is_clean is not None:
            return self._by_kind(x, is_clean)
        if self.gate == "standard":
            return self.standard(x)
        if self.gate == "robust":
            return self.robust(x)
        p_clean = (self.route(x) if routing is None else routing).p_clean[:, None]  # [B, 1]
        standard, robust = self.standard(x), self.robust(x)
        if self.gate == "mixed":
            return mixed(standard, robust, p_clean)
        if self.gate == "soft":
            return p_clean * standard + (1 - p_clean) * robust
        return torch.where(p_clean > self.threshold, standard, robust)

    def _by_kind(self, x: Tensor, is_clean: Tensor) -> Tensor:
        """Each member on the samples of its kind only, so that its batch norms see no others."""
        clean, adversarial = is_clean.nonzero().flatten(), (~is_clean).nonzero().flatten()
        members = ((self.standard, clean), (self.robust, adversarial))
        logits = [member(x[index]) for member, index in members if len(index)]
        order = torch.cat([clean, adversarial]).argsort()
        return torch.cat(logits)[order]


def mixed(standard: Tensor, robust: Tensor, p_clean: Tensor) -> Tensor:
    """log(p softmax(standard) + (1 - p) softmax(robust)) for logits [B, K] and p [B, 1].

    p is kept at least 1e-6 away from 0 and 1, so that its gradient is finite.
    """
    p = p_clean.clamp(1e-6, 1 - 1e-6)
    return torch.logaddexp(p.log() + standard.log_softmax(1), (1 - p).log() + robust.log_softmax(1))
