"""AW-Nets on CIFAR ResNets, a WideResNet and MobileNet-v2: the paper's, a small one, and their ablations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

from awnet.models import mobilenet, wide_resnet
from awnet.models.common import WithInferenceCopy, checked_router_widths, config
from awnet.models.hub import OnHub
from awnet.models.resnet import ARCHITECTURES
from awnet.nn import AdversarialRouter, AWNet, Backbone, FixedRouter
from awnet.nn.backbone import BlockNetwork
from awnet.nn.inference import register_inference_copy
from awnet.nn.inference_network import awnet_copy, check_awnet
from awnet.nn.layers import Activation, Branches
from awnet.nn.router import TestBN
from awnet.scalars import check_flag


def _resnet(name: str, width: float, **options: Any) -> Backbone:
    return Backbone(*ARCHITECTURES[name].scaled(width), **options)


class _Basis(NamedTuple):
    """How the dynamic sub-network is built (from width and options), and the router's stages."""

    build: Callable[..., BlockNetwork]
    router_widths: tuple[int, ...] = (64, 128, 256, 512)
    router_blocks: int = 2


_BASES = {
    "awnet_resnet18": _Basis(partial(_resnet, "resnet18")),
    "awnet_resnet34": _Basis(partial(_resnet, "resnet34")),
    "awnet_resnet50": _Basis(partial(_resnet, "resnet50")),
    "awnet_wrn34_10": _Basis(partial(wide_resnet.backbone, "wrn34_10")),
    "awnet_mobilenet_v2": _Basis(mobilenet.backbone),
    "awnet_tiny": _Basis(partial(_resnet, "resnet_tiny"), ARCHITECTURES["resnet_tiny"].widths, 1),
}
NAMES = tuple(_BASES)


@register_inference_copy(awnet_copy, check_awnet)
class AWResNet(AWNet, WithInferenceCopy, OnHub):
    """An AW-Net whose dynamic sub-network is the residual network of the same name, for small images.

    ``awnet_resnet18`` is the paper's AW-Net (26.3 M parameters), ``awnet_resnet34`` its AW-Net-L. Beside the
    ResNets there are a WideResNet (``awnet_wrn34_10``) and MobileNet-v2 (``awnet_mobilenet_v2``).

    Args:
        name: one of ``list_models("awnet*")``.
        num_classes, in_channels: K and C.
        beta: β of Eq. 19; 0 is a static network.
        bn: ``"mix"`` (the paper's), ``"dual"`` (shared statistics, separate affine parameters) or ``"one"``.
        filter_scaling: False for ω ≡ 1 and no signal heads.
        dynamic_shortcut: whether the filters of 1×1 shortcut convolutions are scaled as well; MobileNet-v2
            has none.
        type_head: False for no type head (Table III); eval mode then uses the branch that ``test_bn`` names.
        test_bn: ``"adv"`` (the default without a type head), ``"clean"``, or ``"mix"`` for half of each.
        p_temperature: divides the type logits before p is taken.
        p_scale: multiplies p in eval mode, in [0, 1].
        router_widths: widths of the router's stages; default those of ResNet-18 (of the network for
            ``awnet_tiny``), times ``width``.
        width: multiplies the channels of the dynamic sub-network.
        activation: replaces every ReLU of the dynamic sub-network by ``"silu"``, ``"gelu"`` or
            ``"leaky_relu"`` (:class:`awnet.nn.AWConv2d`). The router has ReLUs, and MobileNet-v2 has ReLU6.

    Without ``filter_scaling`` and ``type_head`` there is no router: a static network with two batch norms.
    The dynamic sub-network is initialized first, so with the same seed it has the weights of its static twin.
    """

    def __init__(
        self,
        name: str = "awnet_resnet18",
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        beta: float = 3.0,
        bn: Branches = "mix",
        filter_scaling: bool = True,
        dynamic_shortcut: bool = False,
        type_head: bool = True,
        test_bn: TestBN | None = None,
        p_temperature: float = 1.0,
        p_scale: float = 1.0,
        router_widths: Sequence[int] | None = None,
        width: float = 1.0,
        activation: Activation = "relu",
    ) -> None:
        if name not in _BASES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        if bn not in get_args(Branches):
            raise ValueError(f"bn must be one of {list(get_args(Branches))}, got {bn!r}")
        basis = _BASES[name]
        widths = checked_router_widths(router_widths, basis.router_widths, width)
        filter_scaling = check_flag("filter_scaling", filter_scaling)
        type_head = check_flag("type_head", type_head)
        dynamic_shortcut = check_flag("dynamic_shortcut", dynamic_shortcut)
        dynamic = basis.build(
            width,
            num_classes=num_classes,
            in_channels=in_channels,
            dynamic=filter_scaling,
            dynamic_shortcut=dynamic_shortcut,
            bn=bn,
            activation=activation,
        )
        router: AdversarialRouter | FixedRouter
        if filter_scaling or type_head:
            router = AdversarialRouter(
                dynamic.signal_widths,
                in_channels=in_channels,
                widths=widths,
                blocks=[basis.router_blocks] * len(widths),
                beta=beta,
                p_temperature=p_temperature,
                p_scale=p_scale,
                type_head=type_head,
                test_bn=test_bn,
            )
        else:
            router = FixedRouter(test_bn or "adv", in_channels=in_channels)
        super().__init__(dynamic, router)
        self.config: dict[str, Any] = config(
            name,
            num_classes,
            in_channels,
            beta=beta,
            bn=bn,
            filter_scaling=filter_scaling,
            dynamic_shortcut=dynamic_shortcut,
            type_head=type_head,
            test_bn=test_bn,
            p_temperature=p_temperature,
            p_scale=p_scale,
            router_widths=widths,
            width=width,
            activation=activation,
        )
