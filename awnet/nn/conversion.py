"""Conversion of an existing CNN to the dynamic sub-network of an AW-Net, with its weights."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter

from awnet.defaults import standard_defaults
from awnet.devices import check_has_values
from awnet.nn.equivalence import check_equivalence
from awnet.nn.layers import AWConv2d, Branches, FilterScaledConv2d, MixBatchNorm2d
from awnet.nn.merging import trace
from awnet.nn.network import AWNet
from awnet.nn.norm_splitting import split_norms, unfit_norms
from awnet.nn.rewriting import Rewriter, is_conv, module_of
from awnet.nn.router import AdversarialRouter, FixedRouter
from awnet.nn.routing import has_router
from awnet.nn.structure import has_hooks
from awnet.nn.tracing import OtherPath, defined_at, raised_at, where_of
from awnet.nn.wrappers import wrapper_chain

_LOG = logging.getLogger("awnet")
_OURS = (AWConv2d, FilterScaledConv2d, MixBatchNorm2d)
_BATCH_NORM: set[Any] = {F.batch_norm, torch.batch_norm}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, MixBatchNorm2d)


@standard_defaults()
def convert(
    module: nn.Module,
    *,
    router: AdversarialRouter | FixedRouter | None = None,
    router_widths: Sequence[int] | None = None,
    beta: float = 3.0,
    bn: Branches = "mix",
    filter_scaling: bool = True,
    in_channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> AWNet:
    """Turns a torch CNN into an AW-Net that starts with the same logits in eval mode.

    The network is traced with torch.fx. Convolution → batch norm → (addition) → (activation) becomes a fused
    :class:`~awnet.nn.AWConv2d`, a convolution elsewhere a :class:`~awnet.nn.FilterScaledConv2d`, a batch norm
    elsewhere a :class:`~awnet.nn.MixBatchNorm2d`. Stem convolutions (no other before them) and 1×1
    convolutions stay static, all others become dynamic. Both branches of every batch norm start as copies
    of it, and the router's signal heads at zero (ω ≡ 1), so nothing changes until training.

    Everything else stays unchanged and static: linear layers, pools, ``BatchNorm1d``, group norms, dropout
    and stochastic depth, functional convolutions, and convolutions with a replaced forward, hooks or
    parametrizations. Subclasses of ``BatchNorm2d`` and ``SyncBatchNorm`` that compute batch norm and then
    their children in order (timm's ``BatchNormAct2d``) are split into these parts. A module that is called
    several times is one module with one ω. Wrappers of ``DataParallel``, ``DistributedDataParallel`` and
    ``torch.compile`` are removed. ``forward`` may depend on the mode and on the shape of the images; a
    converted network raises if another shape would take another path.

    ``module`` is not changed; modes, device and ``requires_grad`` are copied. The result is compared with the
    original on random images before it is returned, also with random batch norms, since a zero-initialized
    one hides its branch. The logger ``awnet`` logs the numbers of parameters of the network and of its router
    (at level INFO, or WARNING if the router has more); ``print(network)`` shows them too.

    Args:
        module: takes one image tensor [B, C, H, W] and returns logits [B, K]. Other arguments of its forward
            keep their defaults.
        router: a router whose ``signal_widths`` are C_out of the dynamic convolutions; by default a new one.
        router_widths: channels of the new router's stages, of two basic blocks each. By default the largest
            router of at most (64, 128, 256, 512), a ResNet-18, that has no more parameters than ``module``.
        beta: β of the new router.
        bn: branches of every batch norm, ``"mix"``, ``"dual"`` or ``"one"``.
        filter_scaling: False leaves every convolution static; the new router then has only a type head.
        in_channels: channels of the images; by default those of the first convolution, else 3 or 1.
        image_size: side, or height and width, of the images to trace and compare with; by default the first
            of 32, 64, 128, 224 and 299 that the network takes.

    Returns:
        An :class:`~awnet.nn.AWNet`; in train mode it takes ``is_clean``. To store it, register a function
        that builds and converts the network (``awnet.models.register_model``) and create it by that name; or
        keep its ``state_dict()``, and convert the same architecture again before loading that.

    Raises:
        TypeError: ``module`` is not an nn.Module, or ``router`` is not a router.
        ValueError: ``module`` cannot be converted; the message names the part, the file and line, and the
            reason. Or ``router`` does not fit it.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not isinstance(router, AdversarialRouter | FixedRouter | None):
        raise TypeError(
            f"router must be an AdversarialRouter or a FixedRouter, got {type(router).__name__}; "
            "leave it out for a new one"
        )
    if any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
        raise ValueError(
            f"{type(module).__name__} has lazy modules without parameters yet: call it once first"
        )
    check_has_values(module)
    original = _copy(module)
    name = type(original).__name__
    _refuse_whole(original)
    modes = {path: part.training for path, part in original.named_modules()}
    devices = {p.device for p in original.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)):
        x, ranks = _images(original.eval(), in_channels, image_size)
        root = copy.deepcopy(original)  # to be rewritten; the other copy stays to compare with
        unfit = unfit_norms(root, ranks, modes)
        split_norms(root, ranks, unfit)
        _refuse_without_norms(root)
        graph = trace(
            root, x[:2], functools.partial(_is_leaf, filter_scaling=filter_scaling), _is_replaced_norm
        )
    _refuse_unfit(root, graph, unfit)
    rewriter = Rewriter(root, graph, bn, filter_scaling)
    widths = rewriter.rewrite()
    dynamic = fx.GraphModule(root, graph, class_name=name)
    like = next(dynamic.parameters())
    if router is None:
        if router_widths is None:
            router_widths = _fitting_widths(widths, x.shape[1], _parameters(dynamic))
        router = AdversarialRouter(widths, in_channels=x.shape[1], widths=router_widths, beta=beta)
        router.to(like.device, like.dtype)
    else:
        _check_router(router, widths, x.shape[1], like)
    network = AWNet(dynamic, router)
    try:
        check_equivalence(original, network.eval(), x, rewriter.norms)
    except OtherPath as error:  # of x[:2] and x, so only the number of images differs
        raise ValueError(
            f"{name} cannot be converted for batches of every size; use x.shape[0] where forward needs a "
            f"Python integer, as len(x) does. {error}"
        ) from error
    _restore_modes(network, modes)
    sizes = _parameters(dynamic), _parameters(router)
    _LOG.log(
        logging.WARNING if sizes[1] > sizes[0] else logging.INFO,
        f"converted {name}: {sizes[0]:,} parameters in the dynamic network, {sizes[1]:,} in its router",
    )
    return network


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _fitting_widths(signal_widths: list[int], in_channels: int, budget: int) -> tuple[int, ...]:
    """Widths of the largest router with at most ``budget`` parameters, or else of the smallest."""
    *candidates, smallest = [(w, 2 * w, 4 * w, 8 * w) for w in range(64, 4, -4)] + [(4, 8, 16), (4, 8), (4,)]
    for widths in candidates:
        with torch.device("meta"):
            router = AdversarialRouter(signal_widths, in_channels=in_channels, widths=widths)
        if _parameters(router) <= budget:
            return widths
    return smallest


def _check_router(
    router: AdversarialRouter | FixedRouter, widths: list[int], in_channels: int, like: Tensor
) -> None:
    """Raises ValueError unless ``router`` fits the dynamic convolutions, images, device and dtype."""
    if list(router.signal_widths) != widths:
        raise ValueError(
            f"router.signal_widths must be C_out of the dynamic convolutions, {widths}, "
            f"got {list(router.signal_widths)}"
        )
    if isinstance(router, FixedRouter):
        channels = router.in_channels
    else:
        channels = router.backbone.in_channels
        parameter = next(router.parameters())
        if (parameter.device, parameter.dtype) != (like.device, like.dtype):
            raise ValueError(
                f"router must be on the network's device and in its dtype, {like.device} and {like.dtype}, "
                f"got {parameter.device} and {parameter.dtype}: move it there with router.to(...) first"
            )
    if channels != in_channels:
        raise ValueError(
            f"router must take the network's images, of {in_channels} channels, but was created with "
            f"in_channels={channels}"
        )


def _restore_modes(network: AWNet, modes: dict[str, bool]) -> None:
    """Gives the network and each part that was not replaced the mode of the original."""
    network.train(modes[""])
    for path, part in network.dynamic.named_modules():
        if path in modes and not isinstance(part, (*_OURS, fx.GraphModule)):
            part.training = modes[path]


# --- before tracing


def _copy(module: nn.Module) -> nn.Module:
    """A copy without the wrappers of parallel and compiled modules, at any depth."""
    memo: dict[int, Any] = {}
    for part in reversed(list(module.modules())):  # inner ones first
        _, *inner = wrapper_chain(part)
        if inner:
            memo[id(part)] = copy.deepcopy(inner[0], memo)
    return copy.deepcopy(module, memo)


def _refuse_whole(module: nn.Module) -> None:
    """Raises ValueError for reasons that concern the whole module."""
    name = type(module).__name__
    if isinstance(module, AWNet):
        raise ValueError("module is an AW-Net already")
    if has_hooks(module):
        raise ValueError(f"{name} has forward hooks, which tracing would lose; remove them first")
    for path, part in module.named_modules():
        reason = _ours_already(part)
        if reason:
            raise ValueError(f"cannot convert {path!r} ({type(part).__name__}): {reason}")
    if has_router(module):
        raise ValueError(f"{name} already has a router; convert one of its members")
    for path, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"{name}'s parameter {path!r} has hooks, which a copy would lose; remove them first"
            )
    if not any(isinstance(part, _NORMS) for part in module.modules()):
        raise ValueError(
            f"{name} has no nn.BatchNorm2d: clean and adversarial samples have branches in batch norms, so a "
            "network without them (or with frozen ones of another class) cannot be converted"
        )
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError:
        parameters = inspect.signature(module.forward).parameters.values()
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        raise ValueError(
            f"{name}.forward must take one image tensor and nothing else, got {needed}; it is defined at "
            f"{defined_at(module.forward)}"
        ) from None


def _images(
    original: nn.Module, in_channels: int | None, image_size: int | tuple[int, int] | None
) -> tuple[Tensor, dict[str, int]]:
    """Images that the network takes, and the rank of the input of each batch norm that runs on them."""
    first = next((p.in_channels for p in original.modules() if isinstance(p, nn.Conv2d)), 3)
    channels = list(dict.fromkeys((first, 3, 1))) if in_channels is None else [in_channels]
    sides = (32, 64, 128, 224, 299) if image_size is None else (image_size,)
    sizes = [(side, side) if isinstance(side, int) else side for side in sides]
    like = next(p for p in original.parameters() if p.is_floating_point())
    ranks: dict[str, int] = {}
    failures: list[tuple[Tensor, Exception]] = []
    paths = [(path, part) for path, part in original.named_modules() if isinstance(part, _NormBase)]
    hooks = [
        part.register_forward_pre_hook(lambda _, args, path=path: ranks.__setitem__(path, args[0].dim()))
        for path, part in paths
    ]
    try:
        for size, count in itertools.product(sizes, channels):
            generator = torch.Generator().manual_seed(0)
            x = torch.rand(3, count, *size, generator=generator).to(like.device, like.dtype)
            try:
                with torch.no_grad():
                    logits = original(x)
                break
            except Exception as failure:  # any error on a shape that does not fit
                failures.append((x, failure))
        else:
            x, error = failures[0]
            raise ValueError(
                f"the network fails on images {list(x.shape)}, on which it is compared with the "
                f"converted one ({raised_at(error)}: {type(error).__name__}: {error}); pass in_channels and "
                "image_size that fit"
            ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the network must return logits [B, K], got {got}")
    return x, ranks


def _refuse_without_norms(root: nn.Module) -> None:
    if not any(isinstance(part, nn.BatchNorm2d | MixBatchNorm2d) for part in root.modules()):
        raise ValueError(
            f"{type(root).__name__} has no batch norm over images [B, C, H, W]: clean and adversarial "
            "samples have branches in batch norms, so a network without them cannot be converted"
        )


def _is_leaf(module: nn.Module, *, filter_scaling: bool) -> bool:
    """Whether a module contains nothing to replace, so that tracing does not enter it."""
    if isinstance(module, nn.Conv2d | _NormBase | MixBatchNorm2d):
        return True
    return not any(
        _is_replaced_norm(part)
        or isinstance(part, AWConv2d)
        or (filter_scaling and is_conv(part) and part.kernel_size != (1, 1))
        for part in module.modules()
    )


def _is_replaced_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | MixBatchNorm2d)


def _refuse_unfit(root: nn.Module, graph: fx.Graph, unfit: dict[str, str]) -> None:
    """Raises ValueError for a part that would be converted incorrectly, naming it."""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    from_images: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in from_images for source in node.all_input_nodes):
            from_images.add(node)
        if node.op == "call_function" and node.target in _BATCH_NORM and node in from_images:
            raise ValueError(
                f"cannot convert {node.name!r} at {where_of(node)}: {node.target.__name__} is called as a "
                "function, so there is no module to replace; use nn.BatchNorm2d"
            )
        module = module_of(root, node)
        if module is None:
            continue
        name = str(node.target)
        reason = unfit.get(name)
        if isinstance(module, _OURS) and calls[name] > 1:
            reason = "it is called more than once; give each use a module"
        if reason:
            raise ValueError(
                f"cannot convert {name!r} ({type(module).__name__}) at {where_of(node)}: {reason}"
            )


def _ours_already(module: nn.Module) -> str | None:
    """Returns why a layer of this package cannot be converted, or None."""
    if isinstance(module, AWConv2d):
        if module.dynamic or module.bn.branches != "one":
            return "it is dynamic or has two branches already"
        if has_hooks(module) or has_hooks(module.bn):
            return "it has forward hooks, which would be lost; remove them first"
    elif isinstance(module, MixBatchNorm2d):
        if module.branches != "one":
            return "it has two branches already"
        if has_hooks(module):
            return "it has forward hooks, which would be lost; remove them first"
    elif isinstance(module, _OURS):
        return "it is a layer of an AW-Net already"
    return None
