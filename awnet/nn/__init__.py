"""Modules: layers, blocks, backbone, router, the network, and conversion of existing CNNs."""

from awnet.nn.backbone import Backbone, MobileBackbone, WideBackbone
from awnet.nn.blocks import AWBasicBlock, AWBottleneck, AWInvertedResidual, AWPreActivationBlock
from awnet.nn.conversion import convert
from awnet.nn.frozen import Frozen, FrozenAWNet, FrozenBackbone, FrozenCopy, frozen_copy
from awnet.nn.layers import AWConv2d, FilterScaledConv2d, MixBatchNorm2d, synchronize
from awnet.nn.network import AWNet
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing

__all__ = [
    "AWBasicBlock",
    "AWBottleneck",
    "AWConv2d",
    "AWInvertedResidual",
    "AWNet",
    "AWPreActivationBlock",
    "AdversarialRouter",
    "Backbone",
    "FilterScaledConv2d",
    "FixedRouter",
    "Frozen",
    "FrozenAWNet",
    "FrozenBackbone",
    "FrozenCopy",
    "MixBatchNorm2d",
    "MobileBackbone",
    "Routing",
    "WideBackbone",
    "convert",
    "frozen_copy",
    "synchronize",
]
