"""Batch norms of a CNN before its conversion: which can be replaced, and how subclasses split into parts."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from awnet.nn.rewriting import is_norm, replace_module
from awnet.nn.structure import has_hooks
from awnet.nn.tracing import defined_at

_OPTIONS = (bool, int, float, str, tuple, type(None))


def unfit_norms(root: nn.Module, ranks: dict[str, int], modes: dict[str, bool]) -> dict[str, str]:
    """The batch norms that cannot be replaced, by path, with the reasons."""
    unfit = {}
    for path, part in root.named_modules():
        if not isinstance(part, nn.BatchNorm2d) and not _is_sync(part, ranks.get(path)):
            continue
        assert isinstance(part, _NormBase)
        if part.running_mean is None:
            unfit[path] = "it keeps no running statistics (track_running_stats=False)"
        elif parametrize.is_parametrized(part):
            unfit[path] = (
                "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        elif has_hooks(part):
            unfit[path] = "it has forward hooks, which would be lost; remove them first"
        elif modes[""] and not modes[path]:
            unfit[path] = (
                "it is frozen, in eval mode while the network is in train mode, and a batch norm with two "
                "branches has no such state; call .eval() on the whole network or .train() on this part"
            )
    return unfit


def _is_sync(module: nn.Module, rank: int | None) -> bool:
    return isinstance(module, nn.SyncBatchNorm) and rank == 4


def split_norms(root: nn.Module, ranks: dict[str, int], unfit: dict[str, str]) -> None:
    """Replaces subclasses of BatchNorm2d and SyncBatchNorm by a BatchNorm2d and the modules after it."""
    checked: dict[Any, bool] = {}
    for path, part in list(root.named_modules()):
        if path in unfit or is_norm(part):
            continue
        if isinstance(part, nn.BatchNorm2d) or _is_sync(part, ranks.get(path)):
            parts = _split(part, checked)
            if parts is None:
                unfit[path] = (
                    f"its forward, defined at {defined_at(part.forward)}, is neither that of nn.BatchNorm2d "
                    "nor that followed by its child modules in order; use nn.BatchNorm2d and separate modules"
                )
            else:
                replace_module(root, part, parts)


def _split(module: nn.Module, checked: dict[Any, bool]) -> nn.Module | None:
    """``module`` as batch norm and then its child modules in order, or None if it computes something else.

    ``checked`` caches the answer for modules that differ only in their tensors.
    """
    assert isinstance(module, _NormBase)
    norm = nn.BatchNorm2d(
        module.num_features, module.eps, module.momentum, affine=module.affine, device="meta"
    )
    norm.weight, norm.bias = module.weight, module.bias
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(norm, name, getattr(module, name))
    norm.train(module.training)
    if type(module) is nn.SyncBatchNorm and "forward" not in module.__dict__:
        return norm
    children = [(name, child) for name, child in module.named_children() if name != "norm"]
    parts = nn.Sequential(OrderedDict([("norm", norm), *children])) if children else norm
    options = {key: value for key, value in vars(module).items() if isinstance(value, _OPTIONS)}
    options.pop("num_features")
    key = (type(module), module.__dict__.get("forward"), str(options), str(children))
    if key not in checked:
        # synchronizing modules may wait for other processes in training
        modes = (False,) if isinstance(module, nn.SyncBatchNorm) else (False, True)
        checked[key] = all(_compute_the_same(module, parts, training) for training in modes)
    return parts if checked[key] else None


@torch.no_grad()
def _compute_the_same(module: nn.Module, parts: nn.Module, training: bool) -> bool:
    """Whether both return the same for random images, with random weights and statistics."""
    memo: dict[int, Any] = {}
    module, parts = copy.deepcopy(module, memo).train(training), copy.deepcopy(parts, memo).train(training)
    assert isinstance(module, _NormBase)
    assert module.running_mean is not None
    assert module.running_var is not None
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        if tensor is not None:  # shared by both
            tensor.uniform_(0.5, 1.5)
    x = torch.randn(4, module.num_features, 6, 6).to(module.running_mean)
    results = []
    state = [module.running_mean.clone(), module.running_var.clone()]
    for part in (module, parts):
        module.running_mean.copy_(state[0])
        module.running_var.copy_(state[1])
        torch.manual_seed(0)  # for dropout
        try:
            result = part(x.clone())
        except Exception:  # any error of a forward
            return False
        results.append((result, module.running_mean.clone(), module.running_var.clone()))
    return all(
        isinstance(expected, Tensor) and torch.allclose(expected, actual, rtol=1e-3, atol=1e-5)
        for expected, actual in zip(*results, strict=True)
    )
