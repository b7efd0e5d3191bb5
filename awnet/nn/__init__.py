"""Modules: layers, blocks, backbone, router, the network, and conversion of existing CNNs."""

from awnet.nn.backbone import Backbone, MobileBackbone, WideBackbone
from awnet.nn.blocks import AWBasicBlock, AWBottleneck, AWInvertedResidual, AWPreActivationBlock
from awnet.nn.conversion import convert
from awnet.nn.inference import InferenceCopy, PlainInferenceCopy, inference_copy, not_supported
from awnet.nn.inference_network import InferenceAWNet, InferenceBackbone
from awnet.nn.layers import AWConv2d, FilterScaledConv2d, MixBatchNorm2d, synchronize
from awnet.nn.network import AWNet
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing
from awnet.nn.routing import (
    RoutedNetwork,
    Steering,
    WithRouter,
    has_router,
    observe,
    route,
    routed_networks,
    routers,
    steered,
    with_routing,
)
from awnet.nn.wrappers import unwrapped

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
    "InferenceAWNet",
    "InferenceBackbone",
    "InferenceCopy",
    "MixBatchNorm2d",
    "MobileBackbone",
    "PlainInferenceCopy",
    "RoutedNetwork",
    "Routing",
    "Steering",
    "WideBackbone",
    "WithRouter",
    "convert",
    "has_router",
    "inference_copy",
    "not_supported",
    "observe",
    "route",
    "routed_networks",
    "routers",
    "steered",
    "synchronize",
    "unwrapped",
    "with_routing",
]
