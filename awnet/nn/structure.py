"""The structure of a module, without its weights: comparison, description and restoring settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from awnet.nn.wrappers import unwrapped
from awnet.scalars import plain

_INTERNAL = frozenset(vars(nn.Module())) | {"config", "_awnet_config", "_steering", "_hub_mixin_config"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_Settings = dict[str, dict[str, Any]]


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module``, or its backward, runs more than its forward."""
    return any(getattr(module, hooks) for hooks in HOOKS)


class Comparison(NamedTuple):
    """How a module differs from a newly built one.

    settings: plain attributes (numbers, strings, lists) with other values: module path → name → value.
    problems: all other differences, each as a phrase that names the module.
    """

    settings: _Settings
    problems: list[str]


def compare(model: nn.Module, built: nn.Module) -> Comparison:
    """Compares everything that determines what ``model`` and ``built`` compute, except their weights.

    These are the classes of all modules, hooks, replaced methods, names and shapes of weights and buffers,
    and attributes. If ``built`` is on the meta device, values of tensors that are not in a state dict are not
    compared. Wrappers of ``torch.compile`` and data parallelism are ignored, and so are attributes that
    ``built`` does not have, since the code of its classes does not read them.
    """
    modules, built_modules = dict(_modules(model)), dict(_modules(built))
    settings: _Settings = {}
    problems: list[str] = []
    skipped: list[str] = []
    for path in sorted({*modules, *built_modules}):
        if any(path.startswith(prefix) for prefix in skipped):
            continue
        name = path or "the model"
        one, other = modules.get(path), built_modules.get(path)
        if one is None or other is None or not _same_class(one, other):
            skipped.append(f"{path}." if path else "")
            problems.append(_kinds(name, one, other))
            continue
        changed, differences = _differences(name, one, other)
        if changed:
            settings[path] = changed
        problems += differences
    return Comparison(settings, problems)


def _same_class(one: nn.Module, other: nn.Module) -> bool:
    if type(one) is type(other):
        return True
    # every traced or parametrized module has a separate class
    if isinstance(one, fx.GraphModule) and isinstance(other, fx.GraphModule):
        return one.code == other.code
    parametrized = parametrize.is_parametrized(one) and parametrize.is_parametrized(other)
    return parametrized and type(one).__bases__ == type(other).__bases__


def _kinds(name: str, one: nn.Module | None, other: nn.Module | None) -> str:
    if one is None:
        return f"{name} was removed"
    if other is None:
        return f"{name}, a {type(one).__qualname__}, was added"
    return f"{name} is a {type(one).__qualname__} instead of a {type(other).__qualname__}"


def _modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all modules in ``model``, as if there were no wrappers."""
    model = unwrapped(model)
    yield path, model
    for name, child in model.named_children():
        yield from _modules(child, f"{path}.{name}" if path else name)


def _differences(name: str, one: nn.Module, other: nn.Module) -> tuple[dict[str, Any], list[str]]:
    problems = [
        f"{name} has other {hooks.strip('_').replace('_', ' ')}"
        for hooks in HOOKS
        if _names(getattr(one, hooks)) != _names(getattr(other, hooks))
    ]
    for kind in ("parameters", "buffers"):
        shapes, built_shapes = _shapes(one, kind), _shapes(other, kind)
        problems += [
            f"{name} has {kind[:-1]} {key} {_shape(shapes, key)} instead of {_shape(built_shapes, key)}"
            for key in sorted({*shapes, *built_shapes})
            if shapes.get(key) != built_shapes.get(key)
        ]
    problems += [
        f"{name}'s buffer {key}, which no state dict holds, was changed"
        for key in other._non_persistent_buffers_set
        if not _same(one._buffers.get(key), other._buffers[key])
    ]
    settings: dict[str, Any] = {}
    if isinstance(one, fx.GraphModule):
        return settings, problems  # its attributes are those of the graph, whose code was compared
    for key in sorted((vars(one).keys() | vars(other).keys()) - _INTERNAL):
        value, built_value = vars(one).get(key, _MISSING), vars(other).get(key, _MISSING)
        if built_value is _MISSING:
            if callable(getattr(type(one), key, None)):
                problems.append(f"{name} has its method {key} replaced")
            continue
        if value is _MISSING:
            problems.append(f"{name} lacks its attribute {key}")
        elif not _same(value, built_value):
            if _is_plain(plain(value)) and _is_plain(built_value):
                settings[key] = plain(value)
            else:
                problems.append(f"{name} has another {key}")
    return settings, problems


_MISSING = object()


def _names(hooks: Mapping[int, Any]) -> list[str]:
    return [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks.values()]


def _shapes(module: nn.Module, kind: str) -> dict[str, tuple[int, ...]]:
    table: Mapping[str, Tensor | None] = getattr(module, f"_{kind}")
    left_out = module._non_persistent_buffers_set if kind == "buffers" else ()
    return {name: tuple(t.shape) for name, t in table.items() if t is not None and name not in left_out}


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str) -> str:
    return str(list(shapes[key])) if key in shapes else "none"


def _is_plain(value: Any) -> bool:
    """Whether ``value`` can be stored as JSON; a tuple is loaded as a list."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _same(one: Any, other: Any, depth: int = 3) -> bool:
    """Whether two attributes are equal, as far as this can be decided."""
    if one is other or depth == 0:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return False
        return one.is_meta or other.is_meta or torch.equal(one.cpu(), other.cpu().to(one.dtype))
    one, other = plain(one), plain(other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_same(a, b, depth) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], depth) for key in one)
    if _is_plain(one) and _is_plain(other):
        return bool(one == other) and isinstance(one, str) == isinstance(other, str)
    if type(one) is not type(other):
        return False
    if isinstance(one, nn.Module):
        return True  # compared as a module, or not used by the forward
    if isinstance(one, type) or hasattr(one, "__qualname__"):
        return one.__qualname__ == other.__qualname__ and one.__module__ == other.__module__
    if hasattr(one, "__dict__"):
        return _same(vars(one), vars(other), depth - 1)
    if isinstance(one, set | frozenset):
        return len(one) == len(other)
    return type(one).__eq__ is object.__eq__ or bool(_truth(one == other))


def _truth(value: Any) -> bool:
    return bool(value.all()) if hasattr(value, "all") else bool(value)


def apply_settings(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Sets the attributes in :attr:`Comparison.settings`, after they were stored as JSON.

    Raises:
        ValueError: ``model`` lacks a module or attribute, or a value has another kind.
    """
    for path, values in settings.items():
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"its settings name a module {path!r}, which the model lacks") from error
        for name, value in values.items():
            if name in _INTERNAL or name not in vars(module):
                raise ValueError(f"its settings name {path}.{name}, which the model lacks")
            current = vars(module)[name]
            if not _is_plain(current) or not _is_plain(value) or not _same_kind(value, current):
                raise ValueError(f"its setting {path}.{name} cannot be {value!r}")
            setattr(module, name, tuple(value) if isinstance(current, tuple) else value)


def _same_kind(value: Any, current: Any) -> bool:
    if value is None or current is None:
        return True
    for kinds in ((list, tuple), (dict,), (str,), (bool,), (int, float)):
        if isinstance(current, kinds):
            return isinstance(value, kinds) and (kinds == (bool,)) == isinstance(value, bool)
    return False


def describe(model: nn.Module) -> dict[str, str]:
    """Path of each module → its class, with its hooks and replaced methods."""
    lines = {}
    for path, module in _modules(model):
        line = f"{type(module).__module__}.{type(module).__qualname__}"
        for hooks in HOOKS:
            for name in _names(getattr(module, hooks)):
                line += f", {hooks.strip('_').replace('_', ' ')[:-1]} {name}"
        for name in sorted(vars(module).keys() - _INTERNAL):
            if callable(getattr(type(module), name, None)):
                line += f", {name} replaced"
        if isinstance(module, fx.GraphModule):
            line += f", code {hashlib.sha256(module.code.encode()).hexdigest()[:16]}"
        lines[path] = line
    return lines
