"""Routed networks: how to find one in a module, and how to observe or replace its routing.

A routed network is an :class:`~awnet.nn.AWNet`, a Separate-Net (:class:`RoutedNetwork`), or a user's network
with the same interface: ``route(x) -> Routing`` and ``forward(x, *, routing=None)``. An attribute that only
has the name ``route`` or ``router`` does not count.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from awnet.nn.layers import check_is_clean
from awnet.nn.router import Routing
from awnet.nn.wrappers import unwrapped, wrapper_chain


@dataclass
class Steering:
    """Replaces and records the routing of a network's calls.

    route: computes the routing of a call from the network and the images that reach it; None for the
        network's router.
    is_clean: bool [B] for calls in train mode without ``is_clean``.
    routings: the routing of each call, in order.
    """

    route: Callable[[Any, Tensor], Routing] | None = None
    is_clean: Tensor | None = None
    routings: list[Routing] = field(default_factory=list)


class WithRouter(nn.Module):
    """Base class of the package's networks that have a ``router``."""

    router: nn.Module


class RoutedNetwork(WithRouter):
    """Base class of the package's networks with ``route(x)`` and ``forward(x, routing=...)``."""

    _steering: dict[int, Steering] | None = None  # by thread; see steered

    def route(self, x: Tensor) -> Routing:
        """The router's output for images [B, C, H, W]."""
        raise NotImplementedError

    def _steered(
        self, x: Tensor, is_clean: Tensor | None, routing: Routing | None
    ) -> tuple[Tensor | None, Routing | None]:
        """``is_clean`` and ``routing`` of a call on ``x``, completed by a :func:`steered` block."""
        if self._steering is None:
            return is_clean, routing
        steering = self._steering.get(threading.get_ident())
        if steering is None:
            return is_clean, routing
        if is_clean is None and self.training:
            is_clean = steering.is_clean
        if routing is None:
            routing = self.route(x) if steering.route is None else steering.route(self, x)
        steering.routings.append(routing)
        return is_clean, routing

    def _check_is_clean(self, is_clean: Tensor | None, x: Tensor, *, needed: bool, decider: str) -> None:
        """Raises ValueError or TypeError unless ``is_clean`` fits the mode.

        ``needed``: whether train mode needs it. ``decider``: names what decides in eval mode, for messages.
        """
        if self.training and is_clean is None and needed:
            raise ValueError(
                "is_clean is missing: in train mode pass bool [B], True for clean samples; "
                f"call model.eval() for eval mode, where the {decider} decides"
            )
        if not self.training and is_clean is not None:
            raise ValueError(
                "is_clean is for train mode, but the model is in eval mode: call model.train() first, "
                f"or leave is_clean out and let the {decider} decide"
            )
        if is_clean is not None:
            check_is_clean(is_clean, x)


@contextmanager
def steered(network: RoutedNetwork, steering: Steering) -> Iterator[Steering]:
    """``steering`` applies to this thread's calls of ``network``, also inside a module that contains it."""
    thread = threading.get_ident()
    with _LOCK:
        table = dict(network._steering or {})
        before, table[thread] = table.get(thread), steering
        network._steering = table
    try:
        yield steering
    finally:
        with _LOCK:
            table = dict(network._steering or {})
            if before is None:
                table.pop(thread, None)
            else:
                table[thread] = before
            if table:
                network._steering = table
            else:
                del network._steering


_LOCK = threading.Lock()


def has_router(model: nn.Module) -> bool:
    """Whether ``model`` is a routed network or contains exactly one.

    :func:`route` and :func:`observe` then return its routing, also if images are transformed before it.
    """
    return _in_two_parts(model) or len(routed_networks(model)) == 1


def _in_two_parts(model: nn.Module) -> bool:
    """Whether ``model.route(x)`` and ``model(x, routing=...)`` are the two parts of ``model(x)``.

    They are not for a module that contains a routed network, nor for a routed network that changes the images
    first: by a forward pre-hook, or in a subclass's ``forward`` without ``routing``.
    """
    chain = wrapper_chain(model)
    if any(module._forward_pre_hooks for module in chain) or "forward" in vars(chain[-1]):
        return False
    return _takes_routing(type(chain[-1]).forward) and callable(getattr(model, "route", None))


@lru_cache(maxsize=1024)
def _takes_routing(forward: Callable[..., Any]) -> bool:
    try:
        return "routing" in inspect.signature(forward).parameters
    except (TypeError, ValueError):
        return False


def routed_networks(model: nn.Module) -> list[RoutedNetwork]:
    """``model`` itself if it is a :class:`RoutedNetwork`, else the outermost ones that it contains."""
    if isinstance(model, RoutedNetwork):
        return [model]
    networks: dict[int, RoutedNetwork] = {}
    for child in model.children():
        networks |= {id(network): network for network in routed_networks(child)}
    return list(networks.values())


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of the package's networks in ``model``, or of a user's routed network."""
    networks: list[nn.Module] = [module for module in model.modules() if isinstance(module, WithRouter)]
    if not networks and _in_two_parts(model):
        networks = [unwrapped(model)]
    candidates = [getattr(network, "router", None) for network in networks]
    return [router for router in candidates if isinstance(router, nn.Module)]


def observe(model: nn.Module, x: Tensor, steering: Steering | None = None) -> Tensor:
    """``model(x)``; ``steering`` records or replaces the routing of the one routed network in it.

    Afterwards ``steering.routings`` holds that network's routing; for a model without one it is empty.
    """
    steering = Steering() if steering is None else steering
    if _in_two_parts(model):
        network: Any = model
        routing = network.route(x) if steering.route is None else steering.route(network, x)
        steering.routings.append(routing)
        arguments = {} if steering.is_clean is None else {"is_clean": steering.is_clean}
        output: Tensor = network(x, routing=routing, **arguments)
        return output
    networks = routed_networks(model)
    if len(networks) != 1:
        return model(x)
    with steered(networks[0], steering):
        return model(x)


def route(model: nn.Module, x: Tensor) -> Routing:
    """The routing that ``model(x)`` uses; ``model`` must have a router, see :func:`has_router`."""
    if _in_two_parts(model):
        network: Any = model
        routing: Routing = network.route(x)
        return routing
    steering = Steering()
    observe(model, x, steering)
    if len(steering.routings) != 1:
        raise ValueError(
            f"{type(model).__name__} calls its routed network {len(steering.routings)} times for one batch; "
            "attacks and losses on the router need exactly one call"
        )
    return steering.routings[0]


def with_routing(model: nn.Module, x: Tensor, routing: Routing) -> Tensor:
    """``model(x)`` with ``routing`` instead of that of its router."""
    return observe(model, x, Steering(route=lambda network, images: routing))
