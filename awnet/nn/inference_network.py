"""Inference copies of AW-Nets on a ResNet, and of static ResNets, with all batch norms in one table.

The scale and shift of every layer come from one call of ``ops.network_coefficients``, and the layers run as
``ops.affine_network``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import ops
from awnet.nn.backbone import Backbone, MobileBackbone, WideBackbone
from awnet.nn.blocks import (
    AWBasicBlock,
    AWBottleneck,
    AWInvertedResidual,
    AWPreActivationBlock,
    Block,
    ResidualBlock,
)
from awnet.nn.inference import (
    InferenceCopy,
    PlainInferenceCopy,
    empty_copy,
    not_supported,
    register_inference_copy,
    register_layers,
)
from awnet.nn.layers import AWConv2d, FilterScaledConv2d, MixBatchNorm2d, check_image
from awnet.nn.network import AWNet, check_routing
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing, apply_heads
from awnet.ops import launch_config

Coefficients = list[tuple[Tensor, Tensor]]
_ALIGNMENT = 8  # channels of 16 bits in the 16 bytes that cuDNN's fastest kernels read at once


def _convolution(layer: AWConv2d) -> ops.AffineConvolution:
    return ops.AffineConvolution(
        stride=layer.stride,
        padding=cast("tuple[int, int]", layer.padding),
        dilation=layer.dilation,
        groups=layer.groups,
        activation=layer.activation,
    )


def _connected(backbone: Backbone, layers: list[AWConv2d]) -> tuple[list[int], list[ops.NetworkLayer]]:
    """The order in which ``ops.affine_network`` runs ``layers``, as indices, and their connections.

    With a classifier the last layer is averaged over pixels, without one the stem and the last layer of every
    stage are. The order is that of the live network: its ``run`` methods call functions that record.
    """
    sequence: list[int] = []
    connections: list[ops.NetworkLayer] = []
    recorded = 1  # layers; the stem is the first

    def record(index: int, input: int, residual: int | None = None) -> int:
        """Instead of running a layer; an output is represented by its position in ``connections``."""
        sequence.append(index)
        residual = -1 if residual is None else residual
        connections.append(ops.NetworkLayer(_convolution(layers[index]), input, residual, False))
        return len(connections) - 1

    def record_block(block: Block, input: int) -> int:
        nonlocal recorded
        assert isinstance(block, ResidualBlock)
        first, recorded = recorded, recorded + len(block.convolutions())
        return block.run(lambda i, x, residual: record(first + i, x, residual), input)

    ends = backbone.run(record_block, record(0, -1))
    for layer in ends if backbone.classifier is None else ends[-1:]:
        connections[layer] = connections[layer]._replace(averaged=True)
    return sequence, connections


class _InferenceLinear(nn.Module):
    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.live = (linear,)  # in a tuple: no submodule
        self.weight = empty_copy(linear.weight, dtype)
        self.bias = empty_copy(linear.bias, dtype)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.weight, self.live[0].weight), (self.bias, self.live[0].bias)]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class InferenceBackbone(InferenceCopy):
    """The inference copy of a :class:`Backbone`.

    Args:
        backbone: the live backbone.
        dtype: dtype of weights and images; the table of batch norms is float32 or wider.

    Raises:
        TypeError: :func:`check_backbone` gives a reason against a copy.
    """

    tables: Tensor  # [4, 2, T], see ops.network_coefficients

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        reason = check_backbone(backbone)
        if reason is not None:
            raise TypeError(f"{type(backbone).__name__} has no inference copy: {reason}")
        self.live = (backbone,)
        layers = self._live_layers()
        self.eps = layers[0].bn.eps
        self.sequence, self.layers = _connected(backbone, layers)
        self.weights = nn.ParameterList(empty_copy(layers[i].weight, dtype) for i in self.sequence)
        self.in_channels = backbone.in_channels
        self.padding = self._padded_channels() - self.in_channels
        if self.padding:
            stem = F.pad(self.weights[0], (0, 0, 0, 0, 0, self.padding))
            self.weights[0] = nn.Parameter(stem.zero_(), requires_grad=False)
        # the dynamic layers come first in the table, so that their ω is one contiguous block
        self.order = sorted(range(len(layers)), key=lambda i: not layers[i].dynamic)
        self.columns = [self.order.index(i) for i in self.sequence]
        self.widths = tuple(layers[i].out_channels for i in self.order)
        self.has_branches = any(layer.bn.branches != "one" for layer in layers)
        table_dtype = torch.promote_types(dtype, torch.float32)
        tables = torch.empty(4, 2, sum(self.widths), dtype=table_dtype, device=layers[0].weight.device)
        self.register_buffer("tables", tables, persistent=False)
        classifier = backbone.classifier
        self.classifier = None if classifier is None else _InferenceLinear(classifier, dtype)
        self._cached: tuple[int, torch.device, Coefficients] | None = None
        self._folded: tuple[list[Tensor], list[Tensor | None]] | None = None
        self._packed = ops.PackedWeights()
        self.record_structure(backbone)
        self.refresh()

    def _live_layers(self) -> list[AWConv2d]:
        backbone = self.live[0]
        blocks = [block for stage in backbone._stages() for block in stage]
        layers = [backbone.stem, *(layer for block in blocks for layer in block.convolutions())]
        return cast("list[AWConv2d]", layers)

    def _padded_channels(self) -> int:
        """The input channels of the stem's copy; the device's table says whether they are padded."""
        form = launch_config.frozen_network(self.weights[0].device, self.image_dtype)["stem"]
        return self.in_channels if form == "unpadded" else -(-self.in_channels // _ALIGNMENT) * _ALIGNMENT

    def images(self, x: Tensor) -> Tensor:
        """``x`` in the copy's dtype, with zeros for the channels that pad the stem's weight."""
        x = x.to(self.image_dtype)
        return F.pad(x, (0, 0, 0, 0, 0, self.padding)) if self.padding else x

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        layers = self._live_layers()
        pairs: list[tuple[Tensor, Tensor]] = [
            (copy, layers[i].weight) for copy, i in zip(self.weights, self.sequence, strict=True)
        ]
        pairs[0] = (self.weights[0][:, : self.in_channels], layers[0].weight)  # the padding stays 0
        for columns, i in zip(self.tables.split(self.widths, 2), self.order, strict=True):
            norm = layers[i].bn
            for rows, table in zip(
                columns, (norm.weight, norm.bias, norm.running_mean, norm.running_var), strict=True
            ):
                pairs += [(rows[k], table[min(k, len(table) - 1)]) for k in range(2)]
        return pairs + ([] if self.classifier is None else self.classifier.copies())

    def clear_cache(self) -> None:
        self._cached = self._folded = None
        self._packed.clear()

    def coefficients(
        self, batch: int, filter_scale: Tensor | None = None, p_clean: Tensor | None = None
    ) -> Coefficients:
        """Scale and shift [B, C] of all layers, in the order of the table; cached if equal for all images."""
        if p_clean is not None:
            return ops.network_coefficients(self.tables, self.widths, filter_scale, p_clean, eps=self.eps)
        if self.has_branches or filter_scale is not None:
            raise ValueError("p_clean is missing: the branches are blended by p_clean [B]")
        device = self.tables.device
        if self._cached is None or self._cached[:2] != (batch, device):
            with torch.inference_mode(False), torch.no_grad():  # autograd cannot save inference tensors
                zeros = self.tables.new_zeros(batch)
                coefficients = ops.network_coefficients(self.tables, self.widths, None, zeros, eps=self.eps)
            self._cached = (batch, device, coefficients)
        return self._cached[2]

    def averages(self, x: Tensor, coefficients: Coefficients) -> list[Tensor]:
        """Means over pixels [B, C] of the stem and every stage; with a classifier of the last stage only."""
        in_sequence = [coefficients[i] for i in self.columns]
        return ops.affine_network(x, list(self.weights), in_sequence, self.layers, self._packed)

    def static_averages(self, x: Tensor) -> list[Tensor]:
        """:meth:`averages` of a network whose coefficients are equal for all images.

        Where the device's table says so, its batch norms are folded into the weights.
        """
        coefficients = self.coefficients(len(x))
        if not ops.folds_norms(x, self.weights[0], self.layers[0]):
            return self.averages(x, coefficients)
        in_sequence = [coefficients[i] for i in self.columns]
        if self._folded is None or self._folded[0][0].device != x.device:
            with torch.inference_mode(False), torch.no_grad():
                constant = [(scale[0], shift[0]) for scale, shift in in_sequence]
                self._folded = ops.fold_norms(list(self.weights), constant, self.layers)
        weights, biases = self._folded
        mixed = [
            pair if bias is None else (None, bias) for pair, bias in zip(in_sequence, biases, strict=True)
        ]
        return ops.folded_network(x, weights, mixed, self.layers)

    def logits(self, averages: list[Tensor]) -> Tensor:
        if self.classifier is None:
            raise TypeError(
                "a backbone with num_classes=None has no classifier: use averages(x, coefficients)"
            )
        return self.classifier(averages[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], of any floating dtype → logits [B, K] in ``image_dtype``."""
        check_image(x, self.in_channels)
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(self.static_averages(self.images(x)))


class _InferenceRouter(InferenceCopy):
    """The inference copy of a router; its batch norms become scale and shift of its convolutions."""

    def __init__(self, router: AdversarialRouter, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.live = (router,)
        self.backbone = InferenceBackbone(router.backbone, dtype)
        self.type_head = None if router.type_head is None else _InferenceLinear(router.type_head, dtype)
        self.signal_heads = (
            None if router.signal_heads is None else _InferenceLinear(router.signal_heads, dtype)
        )
        self.refresh()

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        heads = (self.type_head, self.signal_heads)
        return self.backbone.copies() + [pair for head in heads if head is not None for pair in head.copies()]

    @property
    def beta(self) -> float:
        """β of the live router."""
        return self.live[0].beta

    def clear_cache(self) -> None:
        self.backbone.clear_cache()

    def graph_key(self) -> tuple[Any, ...]:
        live = self.live[0]
        options = (live.beta, live.p_temperature, live.p_scale, live.fixed_p_clean)
        return (*super().graph_key(), *options)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """type_logits [B, 2] or None, p_clean [B], ω of all dynamic layers [B, D] or None."""
        feature = torch.cat(self.backbone.static_averages(x), dim=1)
        return apply_heads(self.live[0], feature, self.type_head, self.signal_heads, training=False)


class InferenceAWNet(InferenceCopy):
    """The inference copy of an :class:`AWNet`, with ``route(x)`` and ``forward(x, routing=...)``.

    Args:
        model: its dynamic sub-network is a :class:`Backbone`. A converted network (``awnet.convert``) has a
            traced sub-network, whose coefficients cannot be computed ahead: freeze it in place with
            ``awnet.attacks.frozen``.
        dtype: dtype of weights and images; the model's own if None.

    Raises:
        TypeError: the model consists of other parts.
    """

    def __init__(self, model: AWNet, dtype: torch.dtype | None = None) -> None:
        dynamic, router = model.dynamic, model.router
        reason = check_awnet(model) or not_supported(model)
        if reason is not None or not isinstance(dynamic, Backbone):
            raise TypeError(
                f"model must be an AWNet on a Backbone, got {type(model).__name__} on a "
                f"{type(dynamic).__name__} ({reason}); for others use `with awnet.attacks.frozen(model)`"
            )
        assert isinstance(router, AdversarialRouter | FixedRouter)
        super().__init__(next(model.parameters()).dtype if dtype is None else dtype)
        self.dynamic = InferenceBackbone(dynamic, self.image_dtype)
        self.router = (
            router if isinstance(router, FixedRouter) else _InferenceRouter(router, self.image_dtype)
        )
        self.signal_widths = list(router.signal_widths)
        self.record_structure(model)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        router = self.router.copies() if isinstance(self.router, _InferenceRouter) else []
        return self.dynamic.copies() + router

    def clear_cache(self) -> None:
        self.dynamic.clear_cache()
        if isinstance(self.router, _InferenceRouter):
            self.router.clear_cache()

    def graph_key(self) -> tuple[Any, ...]:
        if isinstance(self.router, _InferenceRouter):
            return (*self.dynamic.graph_key(), *self.router.graph_key())
        return (*self.dynamic.graph_key(), self.router.p_clean)

    def _signals(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if isinstance(self.router, _InferenceRouter):
            return self.router(x)
        return None, x.new_full((len(x),), self.router.p_clean), None

    def route(self, x: Tensor) -> Routing:
        """The routing of images [B, C, H, W]."""
        check_image(x, self.dynamic.in_channels)
        with torch.autocast(x.device.type, enabled=False):
            type_logits, p_clean, filter_scale = self._signals(self.dynamic.images(x))
        scales = [] if filter_scale is None else list(filter_scale.split(self.signal_widths, 1))
        return Routing(type_logits, p_clean, scales)

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        """Images [B, C, H, W] in [0, 1], of any floating dtype → logits [B, K] in ``image_dtype``.

        ``routing`` replaces the routing of the router, as in :class:`AWNet`.
        """
        check_image(x, self.dynamic.in_channels)
        with torch.autocast(x.device.type, enabled=False):
            x = self.dynamic.images(x)
            if routing is None:
                _, p_clean, filter_scale = self._signals(x)
            else:
                check_routing(routing, self.signal_widths)
                p_clean = routing.p_clean
                filter_scale = torch.cat(routing.filter_scales, 1) if routing.filter_scales else None
            coefficients = self.dynamic.coefficients(len(x), filter_scale, p_clean)
            return self.dynamic.logits(self.dynamic.averages(x, coefficients))


def check_backbone(backbone: nn.Module) -> str | None:
    """Returns why :class:`InferenceBackbone` would not compute what ``backbone`` does; None if it does."""
    assert isinstance(backbone, Backbone)
    if type(backbone.stages) is not nn.ModuleList:
        return f"stages is a {type(backbone.stages).__name__}"
    layers: list[tuple[str, Any]] = [("stem", backbone.stem)]
    for i, stage in enumerate(backbone.stages):
        if type(stage) is not nn.ModuleList:
            return f"stages.{i} is a {type(stage).__name__}"
        for j, block in enumerate(stage):
            if type(block) not in (AWBasicBlock, AWBottleneck):
                return f"stages.{i}.{j} is a {type(block).__name__}"
            assert isinstance(block, AWBasicBlock | AWBottleneck)
            names = {id(child): name for name, child in block.named_children()}
            layers += [(f"stages.{i}.{j}.{names.get(id(c), '?')}", c) for c in block.convolutions()]
    for name, layer in layers:
        if type(layer) is not AWConv2d:
            return f"{name} is a {type(layer).__name__}"
        if type(layer.bn) is not MixBatchNorm2d:
            return f"{name}.bn is a {type(layer.bn).__name__}"
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"{name} does not pad with a fixed number of zeros"
        if layer.bias is not None:
            return f"{name} has a bias"
    if len({layer.bn.eps for _, layer in layers}) != 1:
        return "its batch norms do not have one eps"
    return _check_linear("classifier", backbone.classifier)


def _check_linear(name: str, layer: nn.Module | None) -> str | None:
    if layer is None:
        return None
    if type(layer) is not nn.Linear:
        return f"{name} is a {type(layer).__name__}"
    return "its " + name + " has no bias" if layer.bias is None else None


def check_awnet(model: AWNet) -> str | None:
    """Returns why no inference copy computes what ``model`` does; None if one does."""
    router = model.router
    if type(router) not in (AdversarialRouter, FixedRouter):
        return f"router is a {type(router).__name__}"
    if type(model.dynamic) is not Backbone:
        return None  # PlainInferenceCopy runs the forward of the model
    reason = check_backbone(model.dynamic)
    if reason is None and model.dynamic.classifier is None:
        reason = "it has no classifier"
    if reason is None and isinstance(router, AdversarialRouter):
        if type(router.backbone) is not Backbone or router.backbone.classifier is not None:
            return "the router's backbone is not the one it was created with"
        reason = (
            check_backbone(router.backbone)
            or _check_linear("router.type_head", router.type_head)
            or _check_linear("router.signal_heads", router.signal_heads)
        )
    return reason


def awnet_copy(model: AWNet, dtype: torch.dtype) -> InferenceCopy:
    """The inference copy of ``model``, specialized if its dynamic sub-network is a :class:`Backbone`."""
    return (
        InferenceAWNet(model, dtype) if type(model.dynamic) is Backbone else PlainInferenceCopy(model, dtype)
    )


register_layers(
    *(AWConv2d, FilterScaledConv2d, MixBatchNorm2d),
    *(AWBasicBlock, AWBottleneck, AWInvertedResidual, AWPreActivationBlock),
    *(Backbone, MobileBackbone, WideBackbone, AdversarialRouter, FixedRouter),
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Dropout, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleList),
)
register_inference_copy(awnet_copy, check_awnet)(AWNet)
