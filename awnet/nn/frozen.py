"""Networks in test mode with their weights frozen: what attacks and evaluation run.

A frozen module holds detached copies of a model's weights in one dtype, its batch norms in one float32 table,
and takes all layers' scale and shift from one call. It is differentiable in the images alone. ``refresh``
brings the copies up to date with the live model, which it neither changes nor holds as a submodule.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import ops
from awnet.nn.backbone import Backbone
from awnet.nn.layers import AWConv2d, check_image
from awnet.nn.network import AWNet
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing, filter_scales_of, p_clean_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Coefficients = list[tuple[Tensor, Tensor]]


def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> Frozen | None:
    """``model.frozen(dtype)``; None for a model that offers no such copy (any module of torch's)."""
    offers = getattr(model, "frozen", None)
    return None if offers is None else offers(dtype)


def _copy_of(x: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Room for a copy of ``x`` in ``dtype``, in its memory format."""
    return nn.Parameter(torch.empty_like(x, dtype=dtype, requires_grad=False), requires_grad=False)


class Frozen(nn.Module):
    """What all frozen modules share: the images' dtype and ``refresh``. Always in test mode."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            names = ", ".join(str(d) for d in _DTYPES)
            raise ValueError(f"dtype must be one of {names}, got {dtype!r}")
        self.image_dtype = dtype
        self.training = False

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of this module with the live one that it copies."""
        raise NotImplementedError

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the live model's present weights: device operations only, fit for a CUDA graph."""
        targets, sources = zip(*self.copies(), strict=True)
        torch._foreach_copy_(targets, sources)
        self.forget()

    def forget(self) -> None:
        """Drops what was made of the copies."""
        raise NotImplementedError

    def baked(self) -> tuple[Any, ...]:
        """What a captured graph of this module holds fast: the addresses that ``refresh`` reads."""
        return tuple(source.data_ptr() for _, source in self.copies())


def _convolution(layer: AWConv2d) -> ops.AffineConvolution:
    return ops.AffineConvolution(
        stride=layer.stride,
        padding=cast("tuple[int, int]", layer.padding),
        dilation=layer.dilation,
        groups=layer.groups,
        activation=layer.activation,
    )


def _wired(backbone: Backbone, layers: list[AWConv2d]) -> tuple[list[int], list[ops.NetworkLayer]]:
    """``layers`` as ``ops.affine_network`` runs them: the place of each in ``layers``, and how they join.

    A backbone with a classifier needs its last layer's average, one without gives the stem's and every
    stage's. A block's shortcut, the last of its convolutions, comes before the chain whose last layer adds
    it.
    """
    sequence: list[int] = []
    wired: list[ops.NetworkLayer] = []

    def append(place: int, input: int, residual: int = -1) -> int:
        sequence.append(place)
        wired.append(ops.NetworkLayer(_convolution(layers[place]), input, residual, False))
        return len(wired) - 1

    ends = [last := append(0, -1)]
    count = 1
    for stage in backbone._stages():
        for block in stage:
            *inner, end = range(count, count := count + len(block.convolutions()))
            x = residual = last
            if block.shortcut is not None:
                residual = append(end, last)
                end = inner.pop()
            for place in inner:
                x = append(place, x)
            last = append(end, x, residual)
        ends.append(last)
    for layer in ends if backbone.classifier is None else ends[-1:]:
        wired[layer] = wired[layer]._replace(averaged=True)
    return sequence, wired


class _FrozenLinear(nn.Module):
    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.live = (linear,)  # in a tuple: no submodule
        self.weight = _copy_of(linear.weight, dtype)
        self.bias = _copy_of(linear.bias, dtype)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.weight, self.live[0].weight), (self.bias, self.live[0].bias)]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class FrozenBackbone(Frozen):
    """A :class:`Backbone` in test mode. ``dtype`` of weights and images; the batch norms' table is wider.

    Raises ValueError where the batch norms differ in eps or a convolution pads otherwise than with zeros.
    """

    tables: Tensor  # [4, 2, T], see ops.network_coefficients

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.live = (backbone,)
        layers = self._live_layers()
        if len({layer.bn.eps for layer in layers}) != 1 or any(
            layer.padding_mode != "zeros" for layer in layers
        ):
            raise ValueError(
                "a frozen backbone needs batch norms of one eps and convolutions padded with zeros"
            )
        self.eps = layers[0].bn.eps
        self.sequence, self.layers = _wired(backbone, layers)
        self.weights = nn.ParameterList(_copy_of(layers[i].weight, dtype) for i in self.sequence)
        # the dynamic layers come first in the table, which holds their ω side by side
        self.order = sorted(range(len(layers)), key=lambda i: not layers[i].dynamic)
        self.places = [self.order.index(i) for i in self.sequence]
        self.widths = tuple(layers[i].out_channels for i in self.order)
        self.in_channels = backbone.in_channels
        self.has_branches = any(layer.bn.branches != "one" for layer in layers)
        wide = torch.promote_types(dtype, torch.float32)
        tables = torch.empty(4, 2, sum(self.widths), dtype=wide, device=layers[0].weight.device)
        self.register_buffer("tables", tables, persistent=False)
        classifier = backbone.classifier
        self.classifier = None if classifier is None else _FrozenLinear(classifier, dtype)
        self._constant: tuple[int, torch.device, Coefficients] | None = None
        self._packed = ops.PackedWeights()
        self.refresh()

    def _live_layers(self) -> list[AWConv2d]:
        backbone = self.live[0]
        blocks = [block for stage in backbone._stages() for block in stage]
        layers = [backbone.stem, *(layer for block in blocks for layer in block.convolutions())]
        return cast("list[AWConv2d]", layers)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        layers = self._live_layers()
        pairs: list[tuple[Tensor, Tensor]] = [
            (own, layers[i].weight) for own, i in zip(self.weights, self.sequence, strict=True)
        ]
        for columns, i in zip(self.tables.split(self.widths, 2), self.order, strict=True):
            norm = layers[i].bn
            for rows, table in zip(
                columns, (norm.weight, norm.bias, norm.running_mean, norm.running_var), strict=True
            ):
                pairs += [(rows[k], table[min(k, len(table) - 1)]) for k in range(2)]
        return pairs + ([] if self.classifier is None else self.classifier.copies())

    def forget(self) -> None:
        self._constant = None
        self._packed.clear()

    def coefficients(
        self, batch: int, omega: Tensor | None = None, p_clean: Tensor | None = None
    ) -> Coefficients:
        """scale and shift [B, C] of every layer, in the table's order; kept where nothing asks for others."""
        if p_clean is not None:
            return ops.network_coefficients(self.tables, self.widths, omega, p_clean, eps=self.eps)
        if self.has_branches or omega is not None:
            raise ValueError("p_clean is missing: the branches are blended by p_clean [B]")
        device = self.tables.device
        if self._constant is None or self._constant[:2] != (batch, device):
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor could enter no graph
                zeros = self.tables.new_zeros(batch)
                made = ops.network_coefficients(self.tables, self.widths, None, zeros, eps=self.eps)
            self._constant = (batch, device, made)
        return self._constant[2]

    def averages(self, x: Tensor, coefficients: Coefficients) -> list[Tensor]:
        """Means over pixels [B, C]: of the stem's and every stage's output; with a classifier the last's."""
        in_sequence = [coefficients[place] for place in self.places]
        return ops.affine_network(x, list(self.weights), in_sequence, self.layers, self._packed)

    def logits(self, x: Tensor, coefficients: Coefficients) -> Tensor:
        if self.classifier is None:
            raise TypeError(
                "a backbone with num_classes=None has no classifier: use averages(x, coefficients)"
            )
        return self.classifier(self.averages(x, coefficients)[-1])

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], of any floating dtype → logits [B, K] in ``image_dtype``."""
        check_image(x, self.in_channels)
        with torch.autocast(x.device.type, enabled=False):
            return self.logits(x.to(self.image_dtype), self.coefficients(len(x)))


class _FrozenRouter(Frozen):
    """The router without its batch norms: they lie in its convolutions' scale and shift."""

    def __init__(self, router: AdversarialRouter, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.live = (router,)
        self.backbone = FrozenBackbone(router.backbone, dtype)
        self.type_head = None if router.type_head is None else _FrozenLinear(router.type_head, dtype)
        self.signal_heads = None if router.signal_heads is None else _FrozenLinear(router.signal_heads, dtype)
        self.refresh()

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        heads = (self.type_head, self.signal_heads)
        return self.backbone.copies() + [pair for head in heads if head is not None for pair in head.copies()]

    @property
    def beta(self) -> float:
        """The live router's."""
        return self.live[0].beta

    def forget(self) -> None:
        self.backbone.forget()

    def baked(self) -> tuple[Any, ...]:
        live = self.live[0]
        options = (live.beta, live.p_temperature, live.p_scale, live.fixed_p_clean)
        return (*super().baked(), *options)

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """type_logits [B, 2] or None, p_clean [B], ω of all dynamic layers [B, D] or None."""
        router = self.live[0]
        feature = torch.cat(self.backbone.averages(x, self.backbone.coefficients(len(x))), dim=1)
        type_logits = None
        if self.type_head is None:
            p_clean = feature.new_full((len(x),), router.fixed_p_clean)
        else:
            type_logits = self.type_head(feature)
            p_clean = p_clean_of(type_logits, router.p_temperature) * router.p_scale
        omega = None
        if self.signal_heads is not None:
            omega = filter_scales_of(self.signal_heads(feature), router.beta)
        return type_logits, p_clean, omega


class FrozenAWNet(Frozen):
    """An :class:`AWNet` in test mode, with the same interface: ``route(x)`` and a call with ``routing``.

    Args:
        model: its dynamic sub-network is a :class:`Backbone`. A converted network (``awnet.convert``) has a
            traced one, of which nothing tells where coefficients could be made ahead: freeze it with
            ``awnet.attacks.frozen``.
        dtype: of weights and images; the model's own if None.

    Raises:
        TypeError: the model is built of other parts.
    """

    def __init__(self, model: AWNet, dtype: torch.dtype | None = None) -> None:
        dynamic, router = model.dynamic, model.router
        if not isinstance(dynamic, Backbone) or not isinstance(router, AdversarialRouter | FixedRouter):
            raise TypeError(
                f"model must be an AWNet on a Backbone, got {type(dynamic).__name__} with "
                f"{type(router).__name__}; for others use `with awnet.attacks.frozen(model)`"
            )
        super().__init__(next(model.parameters()).dtype if dtype is None else dtype)
        self.dynamic = FrozenBackbone(dynamic, self.image_dtype)
        self.router = router if isinstance(router, FixedRouter) else _FrozenRouter(router, self.image_dtype)
        self.signal_widths = list(router.signal_widths)

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        router = self.router.copies() if isinstance(self.router, _FrozenRouter) else []
        return self.dynamic.copies() + router

    def forget(self) -> None:
        self.dynamic.forget()
        if isinstance(self.router, _FrozenRouter):
            self.router.forget()

    def baked(self) -> tuple[Any, ...]:
        if isinstance(self.router, _FrozenRouter):
            return (*self.dynamic.baked(), *self.router.baked())
        return (*self.dynamic.baked(), self.router.p_clean)

    def _signals(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        if isinstance(self.router, _FrozenRouter):
            return self.router(x)
        return None, self.router(x).p_clean, None

    def route(self, x: Tensor) -> Routing:
        """One pass of the router over images [B, C, H, W]."""
        check_image(x, self.dynamic.in_channels)
        with torch.autocast(x.device.type, enabled=False):
            type_logits, p_clean, omega = self._signals(x.to(self.image_dtype))
        scales = [] if omega is None else list(omega.split(self.signal_widths, 1))
        return Routing(type_logits, p_clean, scales)

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        """Images [B, C, H, W] in [0, 1], of any floating dtype → logits [B, K] in ``image_dtype``.

        ``routing`` replaces the router's own, as in :class:`AWNet`.
        """
        check_image(x, self.dynamic.in_channels)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.image_dtype)
            if routing is None:
                _, p_clean, omega = self._signals(x)
            elif len(routing.filter_scales) != len(self.signal_widths):
                raise ValueError(
                    f"routing.filter_scales must hold {len(self.signal_widths)} tensors, one for each "
                    f"dynamic convolution, got {len(routing.filter_scales)}"
                )
            else:
                p_clean = routing.p_clean
                omega = torch.cat(routing.filter_scales, 1) if routing.filter_scales else None
            return self.dynamic.logits(x, self.dynamic.coefficients(len(x), omega, p_clean))


class FrozenCopy(Frozen):
    """Any network, frozen: a copy in test mode whose convolutions and linear layers are in ``dtype``.

    For networks whose coefficients cannot be made ahead. What is not a tensor (a router's ``beta``) stays as
    it was when the copy was made.

    Args:
        model: maps images [B, C, H, W] to logits [B, K].
        dtype: of the images and of convolutions' and linear layers' weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.live = (model,)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.refresh()

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        live = self.live[0]
        return [
            *zip(self.model.parameters(), live.parameters(), strict=True),
            *zip(self.model.buffers(), live.buffers(), strict=True),
        ]

    def forget(self) -> None:
        """Nothing is made of the copies."""

    @property
    def router(self) -> nn.Module:
        """The copy's, where it has one."""
        return self.model.router  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        if name == "route" and hasattr(super().__getattr__("model"), "route"):
            return self._route  # absent where the network has none
        return super().__getattr__(name)

    def _route(self, x: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            return self.model.route(x.to(self.image_dtype))  # type: ignore[operator]

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        """Images [B, C, H, W] in [0, 1], of any floating dtype → logits [B, K]; arguments as the model's."""
        with torch.autocast(x.device.type, enabled=False):
            return self.model(x.to(self.image_dtype), **arguments)
