"""Wrappers that do not change what a module computes: ``torch.compile`` and data parallelism."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")


def _inner_name(module: nn.Module) -> str | None:
    """The name of the child that ``module`` wraps; None if it is not such a wrapper."""
    if type(module) in (nn.DataParallel, nn.parallel.DistributedDataParallel):
        return "module"
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # loaded if anything was compiled
    if dynamo is not None and type(module) is dynamo.OptimizedModule:
        return "_orig_mod"
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """``model`` without wrappers of ``torch.compile`` and data parallelism around it.

    Wrappers around its submodules stay.
    """
    return wrapper_chain(model)[-1]


def wrapper_chain(model: nn.Module) -> list[nn.Module]:
    """``model`` and what each wrapper contains, from the outside; the module without a wrapper is last."""
    chain = [model]
    while (name := _inner_name(chain[-1])) is not None:
        inner = chain[-1]._modules[name]
        assert inner is not None
        chain.append(inner)
    return chain


def without_wrapper_names(model: nn.Module, state: Mapping[str, T]) -> dict[str, T]:
    """``state`` with the keys that ``model`` would have without wrappers, around it and inside it."""
    prefixes = _wrapper_prefixes(model)
    return {_plain_key(key, prefixes): value for key, value in state.items()}


def with_wrapper_names(model: nn.Module, state: Mapping[str, T]) -> dict[str, T]:
    """The reverse of :func:`without_wrapper_names`: keys that ``model.load_state_dict`` takes.

    A key that ``model`` does not have is kept, so that loading reports it.
    """
    prefixes = _wrapper_prefixes(model)
    wrapped = {_plain_key(key, prefixes): key for key in model.state_dict()}
    return {wrapped.get(key, key): value for key, value in state.items()}


def _wrapper_prefixes(model: nn.Module) -> dict[str, str]:
    """For each wrapper in ``model``: the prefix of its child's keys → the prefix without it."""
    prefixes = {}
    for path, module in model.named_modules(remove_duplicate=False):
        name = _inner_name(module)
        if name is not None:
            prefix = f"{path}." if path else ""
            prefixes[f"{prefix}{name}."] = prefix
    return prefixes


def _plain_key(key: str, prefixes: Mapping[str, str]) -> str:
    for prefix in sorted(prefixes, key=len, reverse=True):  # the innermost wrapper first
        if key.startswith(prefix):
            key = prefixes[prefix] + key[len(prefix) :]
    return key
