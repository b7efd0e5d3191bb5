"""AW-Nets on CIFAR ResNets: the paper's networks, a small one, and their ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from awnet.models.hub import OnHub
from awnet.models.resnet import ARCHITECTURES
from awnet.nn import AdversarialRouter, AWNet, Backbone, FixedRouter
from awnet.nn.layers import Branches
from awnet.nn.router import TestBN

# name → dynamic basis, widths of the router's stages, its basic blocks a stage
_BASES: dict[str, tuple[str, tuple[int, ...], int]] = {
    "awnet_resnet18": ("resnet18", (64, 128, 256, 512), 2),
    "awnet_resnet34": ("resnet34", (64, 128, 256, 512), 2),
    "awnet_resnet50": ("resnet50", (64, 128, 256, 512), 2),
    "awnet_tiny": ("resnet_tiny", (16, 32, 64), 1),
}
NAMES = tuple(_BASES)


class AWResNet(AWNet, OnHub):
    """An AW-Net whose dynamic sub-network is the CIFAR ResNet of the same name.

    ``awnet_resnet18`` is the paper's AW-Net (26.3 M parameters), ``awnet_resnet34`` its AW-Net-L.

    Args:
        name: one of ``awnet_resnet18``, ``awnet_resnet34``, ``awnet_resnet50``, ``awnet_tiny``.
        num_classes, in_channels: K and C.
        beta: β of Eq. 19; 0 is a static network.
        bn: ``"mix"`` (the paper's), ``"dual"`` (shared statistics, separate affine parameters) or ``"one"``.
        filter_scaling: False for ω ≡ 1 and no signal heads.
        dynamic_shortcut: whether the filters of 1×1 shortcut convolutions are scaled as well.
        type_head: False for no type head (Table III); test mode then uses the branch that ``test_bn`` names.
        test_bn: ``"adv"`` (the default without a type head), ``"clean"``, or ``"mix"`` for half of each.
        p_temperature: divides the type logits before p is taken.
        p_scale: multiplies p in test mode, in [0, 1].
        router_widths: widths of the router's stages; default those of ResNet-18 (of the network for
            ``awnet_tiny``).

    Without ``filter_scaling`` and ``type_head`` there is no router: a static network with two batch norms.
    The dynamic sub-network is drawn first: under one seed it starts with the weights of its static twin.
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
    ) -> None:
        if name not in _BASES:
            raise ValueError(f"name must be one of {list(NAMES)}, got {name!r}")
        basis, own_widths, router_blocks = _BASES[name]
        widths = list(own_widths if router_widths is None else router_widths)
        dynamic = Backbone(
            *ARCHITECTURES[basis],
            num_classes=num_classes,
            in_channels=in_channels,
            dynamic=filter_scaling,
            dynamic_shortcut=dynamic_shortcut,
            bn=bn,
        )
        router: AdversarialRouter | FixedRouter
        if filter_scaling or type_head:
            router = AdversarialRouter(
                dynamic.signal_widths,
                in_channels=in_channels,
                widths=widths,
                blocks=[router_blocks] * len(widths),
                beta=beta,
                p_temperature=p_temperature,
                p_scale=p_scale,
                type_head=type_head,
                test_bn=test_bn,
            )
        else:
            router = FixedRouter(test_bn or "adv", in_channels=in_channels)
        super().__init__(dynamic, router)
        self.config: dict[str, Any] = {
            "name": name,
            "num_classes": num_classes,
            "in_channels": in_channels,
            "options": {
                "beta": beta,
                "bn": bn,
                "filter_scaling": filter_scaling,
                "dynamic_shortcut": dynamic_shortcut,
                "type_head": type_head,
                "test_bn": test_bn,
                "p_temperature": p_temperature,
                "p_scale": p_scale,
                "router_widths": widths,
            },
        }
