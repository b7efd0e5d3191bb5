"""Inference copies: what attacks, evaluation and teachers run instead of a model.

An inference copy is a module in eval mode that holds detached copies of a model's weights in one dtype. It
is differentiable with respect to the images only. ``refresh`` copies the current weights of the live model,
which the copy neither changes nor holds as a submodule. A copy is made only for a model whose computation is
known exactly (:func:`not_supported` gives the reason against any other).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from awnet.nn.copies import copied
from awnet.nn.layers import AWConv2d
from awnet.nn.router import Routing
from awnet.nn.routing import RoutedNetwork
from awnet.nn.structure import HOOKS, has_hooks
from awnet.nn.wrappers import unwrapped, wrapper_chain

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Network = TypeVar("Network", bound=nn.Module)


def inference_copy(model: nn.Module, dtype: torch.dtype | None = None) -> InferenceCopy | None:
    """Returns an inference copy of ``model``, or None if :func:`not_supported` gives a reason against one.

    Args:
        model: the live model.
        dtype: dtype of weights and images; the model's own if None.
    """
    if not_supported(model) is not None:
        return None
    model = unwrapped(model)
    return _MAKERS[type(model)](model, next(model.parameters()).dtype if dtype is None else dtype)


def not_supported(model: nn.Module) -> str | None:
    """Returns why no inference copy can replace ``model``, or None if one can.

    A copy does not call the model. It is correct only if the model consists of the package's own classes and
    has no replaced methods, hooks, parametrizations or masks. Wrappers of ``torch.compile`` and of data
    parallelism around the model are ignored.
    """
    if torch.nn.modules.module._has_any_global_hook():
        return "global module hooks are registered"
    *wrappers, model = wrapper_chain(model)
    if any(map(has_hooks, wrappers)):
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
    """Returns why ``module`` may not compute what its class did at import; None if it does."""
    kind = type(module)
    methods = _METHODS.get(kind)
    if methods is None:
        return f"is a {kind.__qualname__}, which is not one of awnet's layers"
    if has_hooks(module):
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


_METHODS: dict[type[nn.Module], dict[str, Any]] = {}
"""Layers whose computation is known, with their methods at import."""
_MAKERS: dict[type[nn.Module], Callable[[Any, torch.dtype], InferenceCopy]] = {}
"""The function that makes the inference copy of each class of network."""
_CHECKS: dict[type[nn.Module], Callable[[Any], str | None]] = {}
"""For the same classes: returns a reason against a copy that the general checks do not find, or None."""


def register_layers(*kinds: type[nn.Module]) -> None:
    """Declares that a network with an inference copy may contain modules of exactly these classes."""
    for kind in kinds:
        names = {"forward", "__call__"}
        for base in kind.__mro__:
            if base is not nn.Module and base.__module__.startswith(("awnet.", "torch.nn.")):
                names |= {name for name, value in vars(base).items() if inspect.isfunction(value)}
        _METHODS[kind] = {name: getattr(kind, name) for name in names}


def register_inference_copy(
    maker: Callable[[Any, torch.dtype], InferenceCopy],
    check: Callable[[Any], str | None] = lambda model: None,
) -> Callable[[type[Network]], type[Network]]:
    """Class decorator: ``maker(model, dtype)`` makes the inference copy of a model of exactly this class.

    ``check(model)`` returns a reason against a copy that :func:`not_supported` does not know, or None.
    """

    def register(kind: type[Network]) -> type[Network]:
        register_layers(kind)
        _MAKERS[kind], _CHECKS[kind] = maker, check
        return kind

    return register


def empty_copy(x: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialized parameter of ``x``'s shape and memory format in ``dtype``, without gradient."""
    return nn.Parameter(torch.empty_like(x, dtype=dtype, requires_grad=False), requires_grad=False)


class InferenceCopy(nn.Module):
    """Base class of inference copies. Always in eval mode.

    Args:
        dtype: dtype of images and weights: float32, float64, bfloat16 or float16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        if dtype not in _DTYPES:
            names = ", ".join(str(d) for d in _DTYPES)
            raise ValueError(f"dtype must be one of {names}, got {dtype!r}")
        self.image_dtype = dtype
        self.training = False

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a tensor of this module and the live tensor that it copies."""
        raise NotImplementedError

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the live model's current weights, by device operations that a CUDA graph can capture.

        There is one call for each pair of dtypes, and another for targets with other strides than their
        sources: torch copies lists of one dtype and layout in a few kernels, others tensor by tensor.
        """
        groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in self.copies():
            kind = target.dtype, source.dtype, target.stride() == source.stride()
            targets, sources = groups.setdefault(kind, ([], []))
            targets.append(target)
            sources.append(source)
        for targets, sources in groups.values():
            torch._foreach_copy_(targets, sources)
        self.clear_cache()

    def clear_cache(self) -> None:
        """Drops tensors that were computed from the copies."""
        raise NotImplementedError

    def graph_key(self) -> tuple[Any, ...]:
        """What a captured CUDA graph of this module depends on: the addresses that ``refresh`` reads."""
        return tuple(source.data_ptr() for _, source in self.copies())

    def record_structure(self, model: nn.Module) -> None:
        """Records the structure of the live ``model`` for :meth:`matches`."""
        self._structure = _structure(model)

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` still has the recorded modules, layer settings, shapes and dtypes."""
        return self._structure == _structure(model)


class Watch:
    """Whether a module tree is what it was when the watch was made.

    It compares, by identity, the attributes, parameters, buffers, submodules and hooks of all modules, the
    addresses of parameters and buffers, and the methods of the package's classes. It is several times faster
    than :func:`not_supported` and :meth:`InferenceCopy.matches`, and may report changes that do not matter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        kinds = {kind for module in self._modules if (kind := type(module)) in _METHODS}
        self._methods = [(kind, name, method) for kind in kinds for name, method in _METHODS[kind].items()]
        self._attributes = [vars(module) for module in self._modules]
        self._tables = [
            table for attributes in self._attributes for name in _TABLES if (table := attributes.get(name))
        ]
        self._empty = [
            table
            for attributes in self._attributes
            for name in _TABLES
            if (table := attributes.get(name)) is not None and not table
        ]
        self._tensors = [
            value for table in self._tables for value in table.values() if isinstance(value, Tensor)
        ]
        self._values, self._addresses = self._present(), self._present_addresses()

    def _present(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, [*self._attributes, *self._tables]))]

    def _present_addresses(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._tensors)]

    def unchanged(self) -> bool:
        if any(self._empty) or torch.nn.modules.module._has_any_global_hook():
            return False
        values = self._present()
        return (
            len(values) == len(self._values)
            and all(map(operator.is_, values, self._values))
            and self._present_addresses() == self._addresses
            and all(getattr(kind, name, None) is method for kind, name, method in self._methods)
        )


_TABLES = ("_parameters", "_buffers", "_modules", *HOOKS)


def _structure(model: nn.Module) -> list[Any]:
    structure: list[Any] = []  # modules are equal only if they are the same one
    for module in model.modules():
        shapes = [(p.shape, p.dtype, p.device) for p in module._parameters.values() if p is not None]
        structure.append((module, shapes))
        if isinstance(module, AWConv2d):
            conv = (module.stride, module.padding, module.dilation, module.groups, module.padding_mode)
            structure.append((conv, module.activation, module.dynamic, module.bn.branches, module.bn.eps))
    return structure


class PlainInferenceCopy(InferenceCopy):
    """A deep copy in eval mode whose convolutions and linear layers are in ``dtype``.

    For networks whose coefficients cannot be computed ahead of the layers. ``refresh`` also copies plain
    attributes of the live modules (a router's ``beta``, a threshold).

    Args:
        model: maps images [B, C, H, W] to logits [B, K]; its forward depends only on its modules.
        dtype: dtype of the images and of the weights of convolutions and linear layers.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.live = (model,)
        self.model = copied(model).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        self.record_structure(model)
        self.refresh()

    def copies(self) -> list[tuple[Tensor, Tensor]]:
        live = self.live[0]
        return [
            *zip(self.model.parameters(), live.parameters(), strict=True),
            *zip(self.model.buffers(), live.buffers(), strict=True),
        ]

    def _settings(self) -> list[dict[str, Any]]:
        """The plain attributes of each live module."""
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

    def graph_key(self) -> tuple[Any, ...]:
        settings = tuple(tuple(one.items()) for one in self._settings())
        return (*super().graph_key(), settings)

    def clear_cache(self) -> None:
        """There is no cache."""

    @property
    def router(self) -> nn.Module:
        """The router of the copy, if the network has one."""
        return self.model.router  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        if name == "route" and isinstance(super().__getattr__("model"), RoutedNetwork):
            return self._route  # other networks have no such attribute
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
