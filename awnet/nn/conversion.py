"""An existing CNN becomes the dynamic sub-network of an AW-Net and keeps its weights."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import operator
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from awnet.defaults import standard_defaults
from awnet.devices import check_has_values
from awnet.nn.layers import AWConv2d, Branches, FilterScaledConv2d, MixBatchNorm2d
from awnet.nn.network import AWNet
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing
from awnet.nn.routing import has_router
from awnet.nn.tracing import OtherPath, defined_at, has_hooks, raised_at, trace, where_of
from awnet.nn.wrappers import wrapper_chain

_LOG = logging.getLogger("awnet")
_OURS = (AWConv2d, FilterScaledConv2d, MixBatchNorm2d)
_RELU: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADD: set[Any] = {torch.add, operator.add, operator.iadd, "add", "add_"}
_BATCH_NORM: set[Any] = {F.batch_norm, torch.batch_norm}
_OPTIONS = (bool, int, float, str, tuple, type(None))
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

    The network is traced with torch.fx. Convolution → batch norm → (addition) → (ReLU) becomes one fused
    :class:`~awnet.nn.AWConv2d`, a convolution elsewhere a :class:`~awnet.nn.FilterScaledConv2d`, a batch norm
    elsewhere a :class:`~awnet.nn.MixBatchNorm2d`. Stem convolutions (no other before them) and 1×1
    convolutions stay static, all others become dynamic. Both branches of every batch norm start as copies
    of it, and the router's signal heads at zero (ω ≡ 1), so nothing changes until training.

    Everything else is kept as it is and stays static: linear layers, pools, ``BatchNorm1d``, group norms,
    dropout and stochastic depth, functional convolutions, convolutions with a forward, hooks or
    parametrizations of their own. Subclasses of ``BatchNorm2d`` and ``SyncBatchNorm`` that compute batch
    norm → their children in order (timm's ``BatchNormAct2d``) are split into these parts. A module that is
    called several times is one module with one ω. ``DataParallel``, ``DistributedDataParallel`` and compiled
    wrappers are looked through. ``forward`` may depend on the mode and on the images' shape; a converted
    network raises where another shape would take another path.

    ``module`` itself is not touched; modes, device and ``requires_grad`` carry over. The result is compared
    with the original on random images before it is returned, also with random batch norms, so that a
    zero-initialized one hides nothing. Both numbers of parameters are logged by the logger ``awnet`` (level
    INFO; WARNING if the router is the larger part) and shown by ``print(network)``.

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
        An :class:`~awnet.nn.AWNet`; in training mode it takes ``is_clean``. To store it, register a function
        that builds and converts the network (``awnet.models.register_model``) and create it by that name; or
        keep its ``state_dict()``, and convert the same architecture again before loading that.

    Raises:
        TypeError: ``module`` is no nn.Module, or ``router`` no router.
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
        unfit = _unfit_norms(root, ranks, modes)
        _plain_norms(root, ranks, unfit)
        _refuse_without_norms(root)
        graph = trace(
            root, x[:2], functools.partial(_is_leaf, filter_scaling=filter_scaling), _is_replaced_norm
        )
    _refuse_unfit(root, graph, unfit)
    rewriter = _Rewriter(root, graph, bn, filter_scaling)
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
        _compare(original, network.eval(), x, rewriter.norms)
    except OtherPath as error:  # of x[:2] and x, so only the number of images differs
        raise ValueError(
            f"{name} cannot be converted for batches of every size; use x.shape[0] where forward asks for a "
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
    """Raises unless ``router`` fits a network of these dynamic convolutions, images, device and dtype."""
    if list(router.signal_widths) != widths:
        raise ValueError(
            f"router.signal_widths must be C_out of the dynamic convolutions, {widths}, "
            f"got {list(router.signal_widths)}"
        )
    if isinstance(router, FixedRouter):
        channels = router.in_channels
    else:
        channels = router.backbone.in_channels
        own = next(router.parameters())
        if (own.device, own.dtype) != (like.device, like.dtype):
            raise ValueError(
                f"router must be on the network's device and in its dtype, {like.device} and {like.dtype}, "
                f"got {own.device} and {own.dtype}: move it there with router.to(...) first"
            )
    if channels != in_channels:
        raise ValueError(
            f"router must take the network's images, of {in_channels} channels, but was created with "
            f"in_channels={channels}"
        )


def _restore_modes(network: AWNet, modes: dict[str, bool]) -> None:
    """The original's mode, and for each part that was kept its own."""
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
    """Refuses what no part of can be blamed for."""
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
        raise ValueError(f"{name} has a router of its own already; convert one of its members")
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
    """Images that the network takes, and for each batch norm that then runs the rank of its input."""
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
            except Exception as failure:  # whatever a forward may raise on a shape that does not fit
                failures.append((x, failure))
        else:
            x, error = failures[0]
            raise ValueError(
                f"the network fails on images {list(x.shape)}, on which it is to be compared with the "
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


def _unfit_norms(root: nn.Module, ranks: dict[str, int], modes: dict[str, bool]) -> dict[str, str]:
    """Batch norms that cannot be replaced, each with the reason."""
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


def _plain_norms(root: nn.Module, ranks: dict[str, int], unfit: dict[str, str]) -> None:
    """Replaces subclasses of BatchNorm2d and SyncBatchNorm by a BatchNorm2d and what follows it."""
    checked: dict[Any, bool] = {}
    for path, part in list(root.named_modules()):
        if path in unfit or _is_norm(part):
            continue
        if isinstance(part, nn.BatchNorm2d) or _is_sync(part, ranks.get(path)):
            parts = _split(part, checked)
            if parts is None:
                unfit[path] = (
                    f"its forward, defined at {defined_at(part.forward)}, is neither that of nn.BatchNorm2d "
                    "nor that followed by its child modules in order; use nn.BatchNorm2d and separate modules"
                )
            else:
                _replace(root, part, parts)


def _split(module: nn.Module, checked: dict[Any, bool]) -> nn.Module | None:
    """``module`` as batch norm → child modules in order, if that is what it computes.

    ``checked`` remembers the answer for modules that differ in their tensors only.
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
    """Whether both give the same on random images, with random weights and statistics."""
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
        torch.manual_seed(0)  # of dropout
        try:
            result = part(x.clone())
        except Exception:  # whatever a forward may raise
            return False
        results.append((result, module.running_mean.clone(), module.running_var.clone()))
    return all(
        isinstance(own, Tensor) and torch.allclose(own, other, rtol=1e-3, atol=1e-5)
        for own, other in zip(*results, strict=True)
    )


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``old`` is registered."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def _is_leaf(module: nn.Module, *, filter_scaling: bool) -> bool:
    """Whether nothing inside a module is to be replaced."""
    if isinstance(module, nn.Conv2d | _NormBase | MixBatchNorm2d):
        return True
    return not any(
        _is_replaced_norm(part)
        or isinstance(part, AWConv2d)
        or (filter_scaling and _is_conv(part) and part.kernel_size != (1, 1))
        for part in module.modules()
    )


def _is_replaced_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | MixBatchNorm2d)


# --- the graph


def _module(root: nn.Module, node: object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return root.get_submodule(str(node.target))
    return None


def _computes_as(module: nn.Module | None, base: type[nn.Module], *methods: str) -> bool:
    """Whether ``module`` is a ``base``, or a subclass, that computes the same and runs no hooks."""
    return (
        isinstance(module, base)
        and not has_hooks(module)
        and all(
            getattr(type(module), method) is getattr(base, method) and method not in module.__dict__
            for method in methods
        )
    )


def _is_conv(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return (
        _computes_as(module, nn.Conv2d, "forward", "_conv_forward")
        and module is not None
        and not parametrize.is_parametrized(module)
    )


def _is_norm(module: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    return _computes_as(module, nn.BatchNorm2d, "forward")


def _refuse_unfit(root: nn.Module, graph: fx.Graph, unfit: dict[str, str]) -> None:
    """Refuses by name every part that would come out wrong."""
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
        module = _module(root, node)
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
    """Why a layer of this package cannot be converted, or None."""
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


class _Norm(NamedTuple):
    """What a batch norm has become."""

    mixed: MixBatchNorm2d
    bias: Tensor | None = None
    """Of the convolution before it, which is in the running mean now."""


class _Group(NamedTuple):
    """Nodes that one fused call replaces."""

    conv: fx.Node
    norm: fx.Node
    add: fx.Node | None
    relu: fx.Node | None

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order of execution; the last one's value is the group's."""
        return [node for node in (self.conv, self.norm, self.add, self.relu) if node is not None]


class _Rewriter:
    """Replaces convolutions and batch norms, in the graph and among the modules of ``root``."""

    def __init__(self, root: nn.Module, graph: fx.Graph, bn: Branches, filter_scaling: bool) -> None:
        self.root = root
        self.graph = graph
        self.bn: Branches = bn
        self.filter_scaling = filter_scaling
        self.calls = Counter(id(module) for node in graph.nodes if (module := self._module(node)) is not None)
        self.stems = self._find_stems()
        self.widths: list[int] = []
        self.norms: dict[str, _Norm] = {}
        """By the batch norm's name."""

    def rewrite(self) -> list[int]:
        """Edits in place; returns C_out of every dynamic convolution in the order of ``filter_scales``."""
        self._drop_identities()
        groups = {group.nodes[-1]: group for group in self._groups()}
        fused = {node for group in groups.values() for node in group.nodes}
        image = next(node for node in self.graph.nodes if node.op == "placeholder")
        with self.graph.inserting_before(image.next):
            self.filter_scales = self.graph.placeholder("filter_scales")
            branch: dict[str, Any] = {
                "p_clean": self.graph.placeholder("p_clean"),
                "is_clean": self.graph.placeholder("is_clean"),
            }
        scales: dict[str, fx.Node] = {}  # of convolutions that are called several times
        for node in list(self.graph.nodes):
            module = self._module(node)
            with self.graph.inserting_before(node):
                if node in groups:
                    self._fuse(groups[node], branch)
                elif node in fused:
                    continue
                elif isinstance(module, AWConv2d):
                    module.dynamic = self._is_dynamic(node)
                    module.bn = MixBatchNorm2d.from_batch_norm(module.bn, self.bn)
                    self.norms[f"{node.target}.bn"] = _Norm(module.bn)
                    node.args = (_input(node), self._filter_scale(module) if module.dynamic else None)
                    node.kwargs = {**branch, "residual": node.kwargs.get("residual")}
                elif isinstance(module, nn.BatchNorm2d | MixBatchNorm2d):
                    if str(node.target) not in self.norms:
                        mixed = MixBatchNorm2d.from_batch_norm(module, self.bn)
                        self._replace(node, mixed)
                        self.norms[str(node.target)] = _Norm(mixed)
                    node.args, node.kwargs = (_input(node),), branch
                elif isinstance(module, nn.Conv2d) and (str(node.target) in scales or self._is_dynamic(node)):
                    if str(node.target) not in scales:
                        self._replace(node, _scaled(module))
                        scales[str(node.target)] = self._filter_scale(module)
                    node.args, node.kwargs = (_input(node), scales[str(node.target)]), {}
        for node in reversed(list(self.graph.nodes)):
            if node in fused:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.widths

    def _module(self, node: object) -> nn.Module | None:
        return _module(self.root, node)

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        _replace(self.root, self.root.get_submodule(str(node.target)), module)

    def _filter_scale(self, module: nn.Conv2d) -> fx.Node:
        self.widths.append(module.out_channels)
        return self.graph.call_function(operator.getitem, (self.filter_scales, len(self.widths) - 1))

    def _find_stems(self) -> set[fx.Node]:
        """Convolutions that no other convolution feeds."""
        stems: set[fx.Node] = set()
        fed: set[fx.Node] = set()  # convolutions and all that follows them
        for node in self.graph.nodes:
            module = self._module(node)
            follows = any(source in fed for source in node.all_input_nodes)
            is_conv = isinstance(module, nn.Conv2d)
            if is_conv and _input(node) not in fed:  # a fused layer may have a convolution for its residual
                stems.add(node)
            if follows or (module and any(isinstance(part, nn.Conv2d) for part in module.modules())):
                fed.add(node)
        return stems

    def _is_dynamic(self, conv: fx.Node) -> bool:
        module = self._module(conv)
        assert isinstance(module, nn.Conv2d)
        plain = _is_conv(module) or isinstance(module, AWConv2d)
        return (
            self.filter_scaling and plain and conv not in self.stems and tuple(module.kernel_size) != (1, 1)
        )

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            if _is_bare(self._module(node), nn.Identity):
                node.replace_all_uses_with(_input(node))
                self.graph.erase_node(node)

    def _groups(self) -> list[_Group]:
        """Every convolution → batch norm → (addition) → (ReLU) whose inner values nobody else uses."""
        conv_of: dict[fx.Node, fx.Node] = {}  # batch norm → convolution
        for node in self.graph.nodes:
            norm_module = self._module(node)
            if _is_norm(norm_module) and self.calls[id(norm_module)] == 1:
                conv = _input(node)
                module = self._module(conv)
                if _is_conv(module) and self.calls[id(module)] == 1 and len(conv.users) == 1:
                    conv_of[node] = conv
        groups: dict[fx.Node, _Group] = {}  # by batch norm
        for node in self.graph.nodes:
            operands = self._operands(node)
            norms = [o for o in operands if o in conv_of and o not in groups and len(o.users) == 1]
            if norms and operands[0] is not operands[1]:
                # of two paths the dynamic one takes the addition: a 1×1 shortcut is its residual
                norm = next((n for n in norms if self._is_dynamic(conv_of[n])), norms[0])
                groups[norm] = _Group(conv_of[norm], norm, node, self._relu_after(node))
        for norm, conv in conv_of.items():
            if norm not in groups:
                groups[norm] = _Group(conv, norm, None, self._relu_after(norm))
        return list(groups.values())

    def _relu_after(self, node: fx.Node) -> fx.Node | None:
        """The ReLU that is the only user of ``node``, if there is one."""
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        if user.op == "call_module":
            return user if _is_bare(self._module(user), nn.ReLU) else None
        return user if user.target in _RELU else None

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Both operands of the plain addition of two tensors of one shape, nothing for any other node."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADD:
            return []
        named = {"input", "other"} & set(node.kwargs)
        operands = [*node.args, *(node.kwargs[key] for key in sorted(named))]
        if set(node.kwargs) - named or len(operands) != 2:  # an alpha or an out
            return []
        nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
        shapes = [node.meta.get("shape") for node in nodes]
        return nodes if len(nodes) == 2 and shapes[0] and shapes[0] == shapes[1] else []

    def _fuse(self, group: _Group, branch: dict[str, Any]) -> None:
        conv, norm = self._module(group.conv), self._module(group.norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        layer = AWConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            dynamic=self._is_dynamic(group.conv),
            activation="relu" if group.relu is not None else None,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        layer.weight = conv.weight  # the Parameter itself: weights tied in the original stay tied
        layer.bn = MixBatchNorm2d.from_batch_norm(norm, self.bn, conv.bias)
        self.norms[str(group.norm.target)] = _Norm(layer.bn, conv.bias)
        self._replace(group.conv, layer)
        omega = self._filter_scale(layer) if layer.dynamic else None
        kwargs = dict(branch)
        if group.add is not None:  # asked now: the other operand may have been replaced meanwhile
            kwargs["residual"] = next(o for o in self._operands(group.add) if o is not group.norm)
        call = self.graph.call_module(str(group.conv.target), (_input(group.conv), omega), kwargs)
        call.meta.update(group.nodes[-1].meta)
        group.nodes[-1].replace_all_uses_with(call)


def _is_bare(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly a ``kind``, without hooks or a forward of its own."""
    return type(module) is kind and not has_hooks(module) and "forward" not in module.__dict__


def _input(node: fx.Node) -> fx.Node:
    """What a convolution, batch norm or identity is applied to."""
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def _scaled(conv: nn.Conv2d) -> FilterScaledConv2d:
    layer = FilterScaledConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device="meta",
    )
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer


@torch.no_grad()
def _compare(original: nn.Module, network: AWNet, x: Tensor, norms: dict[str, _Norm]) -> None:
    """Raises unless both give the same logits for ``x`` in eval mode at ω ≡ 1. It changes ``original``.

    They are compared as they are, then with random batch norms: a zero-initialized one would hide its branch.
    """
    _check_error(original, network, x)
    mixed = [norm.mixed for norm in norms.values()]
    tensors = [tensor for norm in mixed for tensor in (*norm.parameters(), *norm.buffers())]
    kept = [tensor.clone() for tensor in tensors], [norm.eps for norm in mixed]
    try:
        _randomize(original, x, norms)
        _check_error(original, network, x)
    finally:
        for tensor, value in zip(tensors, kept[0], strict=True):
            tensor.copy_(value)
        for norm, eps in zip(mixed, kept[1], strict=True):
            norm.eps = eps


def _randomize(original: nn.Module, x: Tensor, norms: dict[str, _Norm]) -> None:
    """Gives the batch norms of both networks the statistics of ``x`` and random weights."""
    parts: dict[str, Any] = dict(original.named_modules())
    pairs = [(parts[path if path in parts else path.removesuffix(".norm")], norms[path]) for path in norms]
    for own, _ in pairs:
        own.eps = 1e-8  # so that a signal does not vanish
        if isinstance(own, nn.BatchNorm2d):
            own.momentum = 1.0
            own.train()
    original(x)
    for own, (mixed, bias) in pairs:
        own.eval()
        if own.weight is not None:
            own.weight.uniform_(0.5, 1.5)
            mixed.weight.copy_(own.weight)
        mixed.running_mean.copy_(own.running_mean if bias is None else own.running_mean - bias)
        mixed.running_var.copy_(own.running_var)
        mixed.eps = own.eps


def _check_error(original: nn.Module, network: AWNet, x: Tensor) -> None:
    # a convolution that sums in another order differs by some 1e-6 in float32, a wrong graph by far more
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 0.1
    error = _error(original, network, x)
    if not error <= tolerance and x.dtype == torch.float32:  # rounding that batch norms enlarged, or a fault
        error = _error(copy.deepcopy(original).double(), copy.deepcopy(network).double(), x.double())
    if not error <= tolerance:
        raise ValueError(
            f"the converted network's logits are off by {error:.1e} of the largest one: forward does "
            "something that tracing cannot follow, such as changing in place a value that is used again"
        )


def _error(original: nn.Module, network: AWNet, x: Tensor) -> float:
    expected = original(x).nan_to_num()
    scales = [x.new_ones(len(x), width) for width in network.router.signal_widths]
    got = network(x, routing=Routing(None, x.new_full((len(x),), 0.5), scales)).nan_to_num()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
