"""A tracer: runs a forward pass on symbols with values and records it as a torch.fx graph.

torch.fx runs a forward pass on symbols. The tracer here runs it on example images at the same time, so that
every symbol also has a value. Therefore:

- Control flow on shapes, dtypes and devices is followed. Its outcome becomes part of the graph, and a
  :class:`Guard` in the graph raises if a later input would lead to another outcome. Control flow on the
  *values* of tensors is an error, which names the file and line.
- A module is traced through only if it contains something to replace. All others are called as they are,
  with their hooks and their dependence on the mode.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from awnet.nn.structure import has_hooks

_HERE = os.path.dirname(__file__) + os.sep
_SKIPPED_FILES = (
    *(os.path.dirname(torch.__file__) + os.sep, functools.__file__),
    *(_HERE + f"{name}.py" for name in ("tracing", "merging", "rewriting", "equivalence", "conversion")),
)
_UNKNOWN = "an unknown line"
PREFIX = "traced_network."  # of names while tracing
_SHAPE_QUERIES = {"size", "stride", "numel", "nelement", "element_size", "storage_offset", "get_device"}
_FACTORIES = ("zeros", "ones", "empty", "rand", "randn")
_ATTRIBUTES = {"shape", "dtype", "device", "layout", "requires_grad", "names", "itemsize", "nbytes"}
_RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"),
    *("normal", "bernoulli"),
    *("multinomial", "poisson", "uniform_", "normal_", "bernoulli_", "random_", "exponential_", "geometric_"),
    *("cauchy_", "log_normal_", "dropout", "alpha_dropout", "feature_dropout", "rrelu"),
}


class Untraceable(Exception):
    """A forward pass does something that a graph cannot represent; the message names it."""


class OtherPath(ValueError):
    """An input would take a path through the forward that was not traced."""


class Guard(nn.Module):
    """Raises :class:`OtherPath` unless a value equals its value when the network was traced."""

    def __init__(self, name: str, expected: Any, truth: bool, where: str) -> None:
        super().__init__()
        self.name = name
        self.expected = expected
        self.truth = truth
        self.where = where

    def forward(self, value: Any) -> None:
        if (bool(value) if self.truth else value) != self.expected:
            raise OtherPath(
                f"forward depends on the images' shape, dtype or device at {self.where}: there it had "
                f"{self.expected!r} when the network was converted and has {value!r} now; convert it with "
                "the image_size, dtype and device of these images"
            )

    def extra_repr(self) -> str:
        return f"{self.expected!r} at {self.where}"


class ModeSwitch(nn.Module):
    """Two graphs with the same inputs and outputs, one for each mode."""

    def __init__(self, in_training: fx.GraphModule, in_eval: fx.GraphModule) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_eval = in_eval

    def forward(self, *values: Any) -> tuple[Any, ...]:
        return (self.in_training if self.training else self.in_eval)(*values)


def location(frame: FrameType | None) -> str:
    """``file:line`` of the innermost frame of the traced code outside torch."""
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED_FILES):
        if frame.f_code is _Root.forward.__code__:
            return _UNKNOWN
        frame = frame.f_back
    return _UNKNOWN if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def raised_at(error: BaseException) -> str:
    """``file:line`` of the innermost frame of an exception's traceback outside torch and this module."""
    trace: TracebackType | None = error.__traceback__
    where = _UNKNOWN
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_SKIPPED_FILES):
            where = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return where


def defined_at(function: Callable[..., Any]) -> str:
    """``file:line`` of a function's definition."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return _UNKNOWN if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def where_of(node: fx.Node) -> str:
    """``file:line`` of the code that a node was traced from."""
    return str(node.meta.get("where", _UNKNOWN))


class _Symbol(fx.Proxy):
    """A proxy whose value for the example images is known to the tracer."""

    tracer: Tracer

    @property
    def _value(self) -> Any:
        return self.tracer.value_of(self.node)

    def _guarded_value(self, truth: bool = False) -> Any:
        return self.tracer.guarded_value(self, truth)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._value, name)
        if name == "ndim":
            return attribute
        if callable(attribute) and not isinstance(attribute, nn.Module):
            return functools.partial(self._call, name)
        symbol = self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return symbol._guarded_value() if isinstance(attribute, str) else symbol

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("dim", "ndimension"):
            return getattr(self._value, name)()
        return self.tracer.create_proxy("call_method", name, (self, *args), kwargs)

    def __bool__(self) -> bool:
        return bool(self._guarded_value(truth=True))

    def __int__(self) -> int:
        return int(self._guarded_value())

    def __index__(self) -> int:
        frame = sys._getframe(1)
        with self.tracer.tentatively((id(frame), frame.f_lasti)):
            return operator.index(self._guarded_value())

    def __float__(self) -> float:
        return float(self._guarded_value())

    def __ceil__(self) -> int:
        return int(self._guarded_value().__ceil__())

    def __floor__(self) -> int:
        return int(self._guarded_value().__floor__())

    def __trunc__(self) -> int:
        return int(self._guarded_value().__trunc__())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._guarded_value(), digits)

    def __contains__(self, item: object) -> bool:
        return item in self._guarded_value()

    def __len__(self) -> int:
        return int(self.shape[0]) if isinstance(self._value, Tensor) else len(self._value)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._value, dict):
            return iter(self._value)
        return iter([self[i] for i in range(len(self))])  # type: ignore[index]


class _Functions(TorchFunctionMode):
    """Records functions of symbols (also of sizes only), and random draws, which would become constants."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.tracer.running or not (name in _RANDOM or _contains((args, kwargs), fx.Proxy)):
            return func(*args, **kwargs)
        frame = sys._getframe(1)
        self.tracer.remove_tentative((id(frame), frame.f_lasti))
        if torch.overrides.is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", name, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


def _contains(value: Any, kind: type) -> bool:
    """Whether ``value`` is a ``kind``, or a dict, list or tuple that contains one at any depth."""
    if isinstance(value, kind):
        return True
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, tuple | list) and any(_contains(item, kind) for item in value)


class _Root(nn.Module):
    """Calls the network with the images only, so that its other arguments have their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.traced_network = network

    def forward(self, x: Tensor) -> Any:
        return self.traced_network(x)


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, is_leaf: Callable[[nn.Module, str], bool], x: Tensor, guards: dict[Any, Guard]
    ) -> None:
        super().__init__()
        self.is_leaf = is_leaf
        self.x = x
        self.guards = guards
        self.guarded: dict[tuple[fx.Node, bool], fx.Node] = {}
        self.tentative: dict[tuple[int, int], list[tuple[fx.Node, bool]]] = {}
        self.values: dict[fx.Node, Any] = {}
        self.from_data: set[fx.Node] = set()  # values computed from a tensor's elements that are not tensors
        self.running = False  # whether calls run without being recorded
        self.inside: list[str] = []  # the modules that are being traced through
        self.failed_in: list[str] | None = None  # those at the time of an exception
        self.python_random = _python_random()

    # --- values

    def value_of(self, node: fx.Node) -> Any:
        if node not in self.values:
            self.values[node] = self._run(node)
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.x
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value_of)
        with self._unrecorded():
            if node.op == "get_attr":
                value: Any = self.root
                for name in str(node.target).split("."):
                    value = getattr(value, name)
            elif node.op == "call_module":
                guard = next((g for g in self.guards.values() if PREFIX + g.name == node.target), None)
                module = guard or self.root.get_submodule(str(node.target))
                state = random.getstate(), np.random.get_state()  # noqa: NPY002 (other code may use it)
                value = module(*args, **kwargs)
                random.setstate(state[0])  # a module may draw random numbers when it runs
                np.random.set_state(state[1])  # noqa: NPY002
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                assert callable(node.target)
                value = node.target(*args, **kwargs)
        if not _contains(value, Tensor) and (
            any(source in self.from_data for source in node.all_input_nodes)
            or (_contains((args, kwargs), Tensor) and not _about_shape(node))
        ):
            self.from_data.add(node)
        return value

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        """In this block calls of modules, parameters and functions are not recorded."""
        running, self.running = self.running, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.running = running

    def guarded_value(self, symbol: _Symbol, truth: bool) -> Any:
        """The value of the symbol, or its truth; from here on the graph is valid for this value only.

        A guard is added that checks it.
        """
        value = symbol._value
        if isinstance(value, Tensor) or symbol.node in self.from_data:
            raise Untraceable("it depends on the values in a tensor, which differ from image to image")
        if truth:
            value = bool(value)
        if (symbol.node, truth) not in self.guarded:
            where = location(sys._getframe(2))
            key = (where, repr(value), truth)
            if key not in self.guards:
                with self._unrecorded():
                    self.guards[key] = Guard(f"_guard_{len(self.guards)}", value, truth, where)
            guard = self.create_proxy("call_module", PREFIX + self.guards[key].name, (symbol,), {})
            self.guarded[symbol.node, truth] = guard.node
        return value

    @contextmanager
    def tentatively(self, call: tuple[int, int]) -> Iterator[None]:
        """Guards that are added in this block can be removed by the same call (frame and instruction).

        Torch's C functions first convert a symbol to an integer and only then let the symbol handle the call.
        """
        before = set(self.guarded)
        yield
        self.tentative.setdefault(call, []).extend(self.guarded.keys() - before)

    def remove_tentative(self, call: tuple[int, int]) -> None:
        for key in self.tentative.pop(call, []):
            self.graph.erase_node(self.guarded.pop(key))

    # --- what torch.fx calls

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_proxy(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Any:
        if _python_random() != self.python_random:
            raise Untraceable(
                "before this line it has drawn from random or numpy.random, whose numbers a graph would "
                "keep forever; draw with torch"
            )
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            raise Untraceable("it runs under torch.no_grad, which a graph does not keep; use detach()")
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        proxy.node.meta["where"] = location(sys._getframe(1))
        if isinstance(value := self.value_of(proxy.node), Tensor):
            proxy.node.meta["shape"] = tuple(value.shape)
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.running:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_leaf(m, module_qualified_name.removeprefix(PREFIX))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.running:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        leaf = self.is_leaf_module(m, name)
        if not leaf and has_hooks(m):
            raise Untraceable(
                f"{name.removeprefix(PREFIX)!r} ({type(m).__name__}) has hooks, which tracing would lose; "
                "remove them first"
            )
        self.inside.append(name.removeprefix(PREFIX))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.inside[::-1]
            raise
        finally:
            self.inside.pop()

    def trace_network(self, network: nn.Module) -> fx.Graph:
        """The graph of ``network``'s forward; names in it are relative to ``network``."""
        set_attribute, enter_autocast = nn.Module.__setattr__, torch.autocast.__enter__

        def refuse_state(module: nn.Module, name: str, value: Any) -> None:
            refused = self.inside and not self.running and not name.startswith("_tensor_constant")
            if refused and not (name in module.__dict__ and module.__dict__[name] is value):
                raise Untraceable(
                    f"it assigns {type(module).__name__}.{name}, which a graph would do only once; keep "
                    "state in buffers that are changed in place"
                )
            set_attribute(module, name, value)

        def refuse_autocast(context: torch.autocast) -> Any:
            if not self.running:
                raise Untraceable(
                    "it runs under torch.autocast, which a graph does not keep; convert dtypes with to()"
                )
            return enter_autocast(context)

        root = _Root(network)
        with ExitStack() as patches:
            patches.enter_context(_replaced(nn.Module, "__setattr__", refuse_state))
            patches.enter_context(_replaced(torch.autocast, "__enter__", refuse_autocast))
            for name in _FACTORIES:
                factory = _with_size_as_tuple(getattr(torch, name))
                patches.enter_context(_replaced(torch, name, factory))
            patches.enter_context(_Functions(self))
            patches.enter_context(torch.enable_grad())
            graph = self.trace(root)
        for node in graph.nodes:
            node.type = None  # annotations written as strings would keep the result from being pickled
            if node.op in ("call_module", "get_attr"):
                node.target = str(node.target).removeprefix(PREFIX)
        constants = {
            name: value for name, value in root.__dict__.items() if name.startswith("_tensor_constant")
        }
        for name, value in constants.items():
            set_attribute(network, name, value)
        clean = fx.Graph()  # without a reference to this tracer, which could not be unpickled
        clean.output(clean.graph_copy(graph, {}))
        return clean


@contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """``target.name`` is ``value`` for a block of code."""
    original = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, original)


def _with_size_as_tuple(factory: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.zeros(b, c)`` becomes ``torch.zeros((b, c))``: torch takes symbols only in the second form."""

    @functools.wraps(factory)
    def call(*size: Any, **options: Any) -> Any:
        if any(isinstance(s, _Symbol) and isinstance(s._value, int) for s in size):
            size = (size,)
        return factory(*size, **options)

    return call


def _python_random() -> tuple[Any, ...]:
    """Changes with every draw from Python's and NumPy's global generators."""
    numpy_state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    return random.getstate()[1][-1], int(numpy_state["pos"])


def _about_shape(node: fx.Node) -> bool:
    """Whether the value of a node that takes tensors does not depend on their elements."""
    if node.op == "call_method":
        return node.target in _SHAPE_QUERIES or str(node.target).startswith("is_")
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES or str(node.args[1]).startswith("is_")
    return node.op == "call_module"  # None, from a module that returns nothing
