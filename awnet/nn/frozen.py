"""Networks in test mode with their weights frozen: what attacks and evaluation run.

A frozen module holds detached copies of a model's weights in one dtype, its batch norms in one float32 table,
and takes all layers' scale and shift from one call. It is differentiable in the images alone. ``refresh``
brings the copies up to date with the live model, which it neither changes nor holds as a submodule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awnet import ops
from awnet.nn.backbone import Backbone, MobileBackbone, WideBackbone
from awnet.nn.blocks import AWBasicBlock, AWBottleneck, AWInvertedResidual, AWPreActivationBlock
from awnet.nn.copies import copied
from awnet.nn.layers import AWConv2d, FilterScaledConv2d, MixBatchNorm2d, check_image
from awnet.nn.network import AWNet
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing, filter_scales_of, p_clean_of
from awnet.nn.routing import RoutedNetwork
from awnet.nn.wrappers import unwrapped, wrapper_chain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Coefficients = list[tuple[Tensor, Tensor]]
Network = TypeVar("Network", bound=nn.Module)


def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> Frozen | None:
    """A frozen copy of ``model``; None where :func:`not_supported` gives a reason against one.

    ``dtype`` is that of weights and images, the model's own if None.
    """
    if not_supported(model) is not None:
        return None
    model = unwrapped(model)
    return _MAKERS[type(model)](model, next(model.parameters()).dtype if dtype is None else dtype)


def not_supported(model: nn.Module) -> str | None:
    """Why no frozen copy can replace ``model``; None where one can.

    A copy does not call the model. It is right only for a model that is exactly what it assumes: the
    package's own classes throughout, no method replaced, no hooks, no parametrizations or masks. Wrappers of
    ``torch.compile`` and data parallelism around the model are looked through.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return "global module hooks are registered"
    *wrappers, model = wrapper_chain(model)
    if any(_hooks(wrapper) for wrapper in wrappers):
        return f"the {type(wrappers[0]).__name__} around it has hooks"
    if type(model) not in _MAKERS:
        base = next((base for base in type(model).__mro__ if base in _MAKERS), None)
        if base is not None:
            return f"{type(model).__qualname__} is a subclass of {base.__name__} and may compute otherwise"
        return f"{type(model).__qualname__} is not a network that awnet can copy"
    dtypes = set()
    kinds = set()
    for path, module in model.named_modules():
        reason = _foreign(module)
        if reason is None and type(module) not in kinds:
            kinds.add(type(module))
            reason = _patched(type(module))
        if reason is not None:
            return f"{path or type(model).__name__} {reason}"
        for parameter in module._parameters.values():
            if parameter is not None:
                dtypes.add(parameter.dtype)
    if len(dtypes) != 1:
        return f"its parameters have {len(dtypes)} dtypes"
    if not dtypes <= set(_DTYPES):
        return f"its parameters have dtype {dtypes.pop()}"
    return _CHECKS[type(model)](model)


def _foreign(module: nn.Module) -> str | None:
    """Why ``module`` may compute something else than its class did when it was imported."""
    kind = type(module)
    methods = _METHODS.get(kind)
    if methods is None:
        return f"is a {kind.__qualname__}, which is not one of awnet's layers"
    if _hooks(module):
        return "has hooks"
    replaced = vars(module).keys() & methods.keys()
    if replaced:
        return f"has its {min(replaced)} replaced"
    if any(p is not None and type(p) is not nn.Parameter for p in module._parameters.values()):
        return "has a weight that is not a plain parameter"
    if any(b is not None and type(b) is not Tensor for b in module._buffers.values()):
        return "has a buffer that is not a plain tensor"
    return None


def _patched(kind: type[nn.Module]) -> str | None:
    for name, method in _METHODS[kind].items():
        if getattr(kind, name, None) is not method:
            return f"is a {kind.__qualname__}, whose {name} was replaced"
    return None


def _hooks(module: nn.Module) -> bool:
    """Whether calling ``module``, forward or backward, runs hooks."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_METHODS: dict[type[nn.Module], dict[str, Any]] = {}
"""Layers whose computation is known, with their methods as they were imported."""
_MAKERS: dict[type[nn.Module], Callable[[Any, torch.dtype], Frozen]] = {}
"""Networks that have a frozen copy, with what makes it."""


_CHECKS: dict[type[nn.Module], Callable[[Any], str | None]] = {}
"""For the same networks: a reason against a copy that the general checks do not find, or None."""


def known_layers(*kinds: type[nn.Module]) -> None:
    """Declares that a frozen copy may hold modules of exactly these classes."""
    for kind in kinds:
        names = {"forward", "__call__"}
        for base in kind.__mro__:
            if base is not nn.Module and base.__module__.startswith(("awnet.", "torch.nn.")):
                names |= {name for name, value in vars(base).items() if inspect.isfunction(value)}
        _METHODS[kind] = {name: getattr(kind, name) for name in names}


def copied_by(
    maker: Callable[[Any, torch.dtype], Frozen], check: Callable[[Any], str | None] = lambda model: None
) -> Callable[[type[Network]], type[Network]]:
    """Class decorator: ``maker(model, dtype)`` makes the frozen copy of a model of exactly this class.

    ``check(model)`` gives a reason against a copy that :func:`not_supported` cannot know, or None.
    """

    def register(kind: type[Network]) -> type[Network]:
        known_layers(kind)
        _MAKERS[kind], _CHECKS[kind] = maker, check
        return kind

    return register


def copy_of(model: nn.Module, dtype: torch.dtype | None) -> Frozen:
    """:func:`frozen_copy`, or TypeError with the reason why there is none."""
    found = frozen_copy(model, dtype)
    if found is None:
        raise TypeError(
            f"{type(model).__name__} has no frozen copy: {not_supported(model)}; freeze the model itself: "
            "`with awnet.attacks.frozen(model)`"
        )
    return found


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

    def remember(self, model: nn.Module) -> None:
        """Notes the structure of ``model``, of which this is a copy, for :meth:`is_of`."""
        self._structure = _structure(model)

    def is_of(self, model: nn.Module) -> bool:
        """Whether ``refresh`` is enough to follow ``model``: same modules, layer settings, shapes, dtypes."""
        return self._structure == _structure(model)


class _Same:
    """Compares by identity, and keeps the object alive."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.module is self.module

    __hash__ = None  # type: ignore[assignment]


def _structure(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        shapes = [(p.shape, p.dtype, p.device) for p in module._parameters.values() if p is not None]
        found.append((_Same(module), shapes))
        if isinstance(module, AWConv2d):
            conv = (module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
            found.append((conv, module.activation, module.dynamic, module.bn.branches, module.bn.eps))
    return found


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

    Raises TypeError for a backbone that :func:`check_backbone` gives a reason against.
    """

    tables: Tensor  # [4, 2, T], see ops.network_coefficients

    def __init__(self, backbone: Backbone, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        reason = check_backbone(backbone)
        if reason is not None:
            raise TypeError(f"{type(backbone).__name__} has no frozen copy: {reason}")
        self.live = (backbone,)
        layers = self._live_layers()
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
        self.remember(backbone)
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
        reason = check_awnet(model) or not_supported(model)
        if reason is not None or not isinstance(dynamic, Backbone):
            raise TypeError(
                f"model must be an AWNet on a Backbone, got {type(model).__name__} on a "
                f"{type(dynamic).__name__} ({reason}); for others use `with awnet.attacks.frozen(model)`"
            )
        assert isinstance(router, AdversarialRouter | FixedRouter)
        super().__init__(next(model.parameters()).dtype if dtype is None else dtype)
        self.dynamic = FrozenBackbone(dynamic, self.image_dtype)
        self.router = router if isinstance(router, FixedRouter) else _FrozenRouter(router, self.image_dtype)
        self.signal_widths = list(router.signal_widths)
        self.remember(model)

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

    For networks whose coefficients cannot be made ahead. ``refresh`` brings over the live model's plain
    settings too (a router's ``beta``, a threshold).

    Args:
        model: maps images [B, C, H, W] to logits [B, K]; its forward pass depends on nothing but its modules.
        dtype: of the images and of convolutions' and linear layers' weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.live = (model,)
        self.model = copied(model).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.remember(model)
        self.refresh()

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        live = self.live[0]
        return [
            *zip(self.model.parameters(), live.parameters(), strict=True),
            *zip(self.model.buffers(), live.buffers(), strict=True),
        ]

    def _settings(self) -> list[dict[str, Any]]:
        """The live modules' plain attributes, module by module."""
        return [
            {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, bool | int | float | str | tuple | None) and name != "training"
            }
            for module in self.live[0].modules()
        ]

    def refresh(self) -> None:
        for module, settings in zip(self.model.modules(), self._settings(), strict=True):
            vars(module).update(settings)
        super().refresh()

    def baked(self) -> tuple[Any, ...]:
        settings = tuple(tuple(one.items()) for one in self._settings())
        return (*super().baked(), settings)

    def forget(self) -> None:
        """Nothing is made of the copies."""

    @property
    def router(self) -> nn.Module:
        """The copy's, where it has one."""
        return self.model.router  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        if name == "route" and isinstance(super().__getattr__("model"), RoutedNetwork):
            return self._route  # absent where the network has none
        return super().__getattr__(name)

    def _route(self, x: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            routing: Routing = self.model.route(x.to(self.image_dtype))  # type: ignore[operator]
        return routing

    def forward(self, x: Tensor, *, routing: Routing | None = None) -> Tensor:
        """Images [B, C, H, W] in [0, 1], any floating dtype → logits [B, K]; ``routing`` as in the model."""
        arguments = {} if routing is None else {"routing": routing}
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = self.model(x.to(self.image_dtype), **arguments)
        return logits


def check_backbone(backbone: nn.Module) -> str | None:
    """Why :class:`FrozenBackbone` does not compute what ``backbone`` does; None where it does."""
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
    """Why no frozen copy computes what ``model`` does; None where one does."""
    router = model.router
    if type(router) not in (AdversarialRouter, FixedRouter):
        return f"router is a {type(router).__name__}"
    if type(model.dynamic) is not Backbone:
        return None  # a FrozenCopy runs the model's own forward
    reason = check_backbone(model.dynamic)
    if reason is None and model.dynamic.classifier is None:
        reason = "it has no classifier"
    if reason is None and isinstance(router, AdversarialRouter):
        if type(router.backbone) is not Backbone or router.backbone.classifier is not None:
            return "the router's backbone is not the one that it was made with"
        reason = (
            check_backbone(router.backbone)
            or _check_linear("router.type_head", router.type_head)
            or _check_linear("router.signal_heads", router.signal_heads)
        )
    return reason


def awnet_copy(model: AWNet, dtype: torch.dtype) -> Frozen:
    """With all coefficients made at once where the dynamic sub-network is a :class:`Backbone`."""
    return FrozenAWNet(model, dtype) if type(model.dynamic) is Backbone else FrozenCopy(model, dtype)


known_layers(
    *(AWConv2d, FilterScaledConv2d, MixBatchNorm2d),
    *(AWBasicBlock, AWBottleneck, AWInvertedResidual, AWPreActivationBlock),
    *(Backbone, MobileBackbone, WideBackbone, AdversarialRouter, FixedRouter),
    *(nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
    *(nn.Dropout, nn.Flatten, nn.Identity, nn.Sequential, nn.ModuleList),
)
copied_by(awnet_copy, check_awnet)(AWNet)
