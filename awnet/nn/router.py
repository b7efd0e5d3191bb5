"""The adversarial router: classifies images as clean or adversarial and computes the filter scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from awnet.nn.backbone import Backbone
from awnet.nn.layers import check_image
from awnet.ops import global_average
from awnet.precision import at_least_float32
from awnet.scalars import check_flag, check_number

TestBN = Literal["mix", "adv", "clean"]
_FIXED_P_CLEAN = {"mix": 0.5, "adv": 0.0, "clean": 1.0}


@dataclass
class Routing:
    """The router's output for a batch; all of it is differentiable with respect to the images."""

    type_logits: Tensor | None
    """[B, 2] in the order [adversarial, clean]; None if the router has no type head."""
    p_clean: Tensor
    """[B], the weight of the clean branch in eval mode."""
    filter_scales: list[Tensor]
    """ω [B, C_out], one for each dynamic convolution, in order; empty without filter scaling."""


def _fixed_p_clean(test_bn: TestBN) -> float:
    if test_bn not in _FIXED_P_CLEAN:
        raise ValueError(f"test_bn must be one of {list(get_args(TestBN))}, got {test_bn!r}")
    return _FIXED_P_CLEAN[test_bn]


def p_clean_of(type_logits: Tensor, p_temperature: float) -> Tensor:
    """The probability [B] that each sample is clean, float32 or wider, Eq. 18."""
    return (at_least_float32(type_logits) / p_temperature).softmax(1)[:, 1]


def filter_scales_of(signals: Tensor, beta: float) -> Tensor:
    """ω = (tanh(signals) + 1)^β, float32 or wider, Eq. 19."""
    base = at_least_float32(signals).tanh() + 1  # the sum cancels in 16 bits
    if beta < 1:
        base = base.clamp(min=1e-6)
    return base.pow(beta)


class AdversarialRouter(nn.Module):
    """A plain ResNet without its classifier, with a type head and signal heads, Eq. 17–19.

    The feature ψ_M [B, d] concatenates the global average pools of the stem and of every stage. The type head
    gives ``p_clean = softmax(type_logits / p_temperature)[:, 1]``. Each dynamic convolution has a signal head
    ``Linear(d, C_out)``. All of them are one linear layer, ``signal_heads``, whose output is split. Its
    weights are initialized to zero, so that ω = (tanh(·) + 1)^β is 1 at first.

    Args:
        signal_widths: C_out of each dynamic convolution; empty for none (no filter scaling).
        in_channels: channels of the images.
        widths, blocks: channels and number of basic blocks of each stage; the default is ResNet-18.
        beta: β ≥ 0 of Eq. 19; ω is in (0, 2^β). At 0 the network is static. Below 1 the slope at ω = 0 is
            infinite, so tanh(·) + 1 is clamped to at least 1e-6.
        p_temperature: divides the type logits before the softmax (not in ``type_logits``).
        p_scale: in [0, 1], multiplies ``p_clean`` in eval mode; below 1 the adversarial branch always counts.
        type_head: False omits the type head (Table III); then ``test_bn`` fixes ``p_clean``.
        test_bn: without a type head, the branch of eval mode: ``"adv"`` (the default, as in the paper),
            ``"clean"``, or ``"mix"`` for half of each.
    """

    def __init__(
        self,
        signal_widths: Sequence[int],
        *,
        in_channels: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] | None = None,
        beta: float = 3.0,
        p_temperature: float = 1.0,
        p_scale: float = 1.0,
        type_head: bool = True,
        test_bn: TestBN | None = None,
    ) -> None:
        super().__init__()
        beta, p_scale = check_number("beta", beta, 0), check_number("p_scale", p_scale, 0, 1)
        p_temperature = check_number("p_temperature", p_temperature, above=0)
        type_head = check_flag("type_head", type_head)
        if type_head and test_bn is not None:
            raise ValueError(
                f"test_bn={test_bn!r} needs type_head=False: with a type head, its p_clean decides"
            )
        self.signal_widths = list(signal_widths)
        self.beta = beta
        self.p_temperature = p_temperature
        self.p_scale = p_scale
        self.fixed_p_clean = _fixed_p_clean(test_bn or "adv")
        self.backbone = Backbone(
            "basic",
            [2] * len(widths) if blocks is None else blocks,
            widths,
            num_classes=None,
            in_channels=in_channels,
            dynamic=False,
            bn="one",
        )
        features = self.backbone.num_features
        self.type_head = nn.Linear(features, 2) if type_head else None
        self.signal_heads: nn.Linear | None = None
        if self.signal_widths:
            self.signal_heads = nn.Linear(features, sum(self.signal_widths))
            nn.init.zeros_(self.signal_heads.weight)
            nn.init.zeros_(self.signal_heads.bias)

    def forward(self, x: Tensor) -> Routing:
        """Images [B, C, H, W] in [0, 1] → :class:`Routing`. Nothing is detached."""
        feature = torch.cat(
            [global_average(stage) for stage in self.backbone.features(x)], dim=1
        )  # [B, d], Eq. 17
        type_logits, p_clean, filter_scale = apply_heads(
            self, feature, self.type_head, self.signal_heads, training=self.training
        )
        filter_scales: list[Tensor] = []
        if filter_scale is not None:
            # contiguous once, for all kernels of a layer and its gradient that read it
            filter_scales = [scale.contiguous() for scale in filter_scale.split(self.signal_widths, dim=1)]
        return Routing(type_logits, p_clean, filter_scales)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, p_temperature={self.p_temperature}, p_scale={self.p_scale}"


def apply_heads(
    router: AdversarialRouter,
    feature: Tensor,
    type_head: nn.Module | None,
    signal_heads: nn.Module | None,
    *,
    training: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The output of ``router``'s heads, or of copies of them, for ψ_M; Eq. 18 and 19.

    Args:
        router: its β, p_temperature, p_scale and fixed p are used.
        feature: ψ_M [B, d].
        type_head, signal_heads: the two linear layers, or None without them.
        training: train mode; in eval mode p is multiplied by ``p_scale``.

    Returns:
        type_logits [B, 2] or None, p_clean [B], and ω [B, Σ C_out] of all dynamic convolutions or None.
    """
    type_logits = filter_scale = None
    if type_head is None:
        p_clean = feature.new_full((feature.shape[0],), router.fixed_p_clean)
    else:
        type_logits = type_head(feature)
        p_clean = p_clean_of(type_logits, router.p_temperature)
        if not training:
            p_clean = p_clean * router.p_scale
    if signal_heads is not None:
        filter_scale = filter_scales_of(signal_heads(feature), router.beta)
    return type_logits, p_clean, filter_scale


class FixedRouter(nn.Module):
    """A router without parameters: ω ≡ 1 and the same ``p_clean`` for all samples.

    An AW-Net with it is a static network with two batch norms, the baseline for the router.
    """

    signal_widths: tuple[int, ...] = ()

    def __init__(self, test_bn: TestBN = "adv", *, in_channels: int = 3) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.p_clean = _fixed_p_clean(test_bn)

    def forward(self, x: Tensor) -> Routing:
        """Images [B, in_channels, H, W] → the fixed :class:`Routing`."""
        check_image(x, self.in_channels)
        return Routing(None, x.new_full((x.shape[0],), self.p_clean), [])

    def extra_repr(self) -> str:
        return f"p_clean={self.p_clean}"
