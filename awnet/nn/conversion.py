"""An existing CNN becomes the dynamic sub-network of an AW-Net and keeps its weights."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from awnet.nn.layers import AWConv2d, Branches, FilterScaledConv2d, MixBatchNorm2d
from awnet.nn.network import AWNet
from awnet.nn.router import AdversarialRouter, FixedRouter, Routing

_OURS = (AWConv2d, FilterScaledConv2d, MixBatchNorm2d)
_RELU: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_ADD: set[Any] = {torch.add, operator.add, operator.iadd, "add", "add_"}
_FUNCTIONAL: set[Any] = {F.conv2d, torch.conv2d, F.batch_norm, torch.batch_norm}


def convert(
    module: nn.Module,
    *,
    router: AdversarialRouter | FixedRouter | None = None,
    router_widths: Sequence[int] = (64, 128, 256, 512),
    beta: float = 3.0,
    bn: Branches = "mix",
    filter_scaling: bool = True,
    in_channels: int | None = None,
    image_size: int | tuple[int, int] = 32,
) -> AWNet:
    """Turns a torch CNN into an AW-Net that starts with the same logits in test mode.

    The network is traced with torch.fx. Convolution → batch norm → (addition) → (ReLU) becomes one fused
    :class:`~awnet.nn.AWConv2d`, a convolution elsewhere a :class:`~awnet.nn.FilterScaledConv2d`, a batch norm
    elsewhere a :class:`~awnet.nn.MixBatchNorm2d`. Stem convolutions (no other before them) and 1×1
    convolutions stay static, all others become dynamic. Both branches of every batch norm start as copies
    of it, and the router's signal heads at zero (ω ≡ 1), so nothing changes until training. Linear layers,
    pools, group norms and other modules are kept as they are. ``module`` itself is not touched; its mode and
    device carry over. The result is compared with the original on random images before it is returned.

    Args:
        module: takes one image tensor [B, C, H, W] and returns logits [B, K].
        router: a router whose ``signal_widths`` are C_out of the dynamic convolutions; by default a new one.
        router_widths, beta: stages and β of the new router (two basic blocks a stage; ResNet-18).
        bn: branches of every batch norm, ``"mix"``, ``"dual"`` or ``"one"``.
        filter_scaling: False leaves every convolution static; the new router then has only a type head.
        in_channels: channels of the images; by default those of the first layer.
        image_size: side, or height and width, of the images to compare with.

    Returns:
        An :class:`~awnet.nn.AWNet`; in training mode it takes ``is_clean``. It has no name in the registry:
        keep its ``state_dict()`` to store it, and convert the same architecture again before loading that.

    Raises:
        TypeError: ``module`` is no nn.Module, or ``router`` no router.
        ValueError: ``module`` cannot be converted; the message names the part and the reason. Or ``router``
            does not fit it.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not isinstance(router, AdversarialRouter | FixedRouter | None):
        raise TypeError(
            f"router must be an AdversarialRouter or a FixedRouter, got {type(router).__name__}; "
            "leave it out for a new one"
        )
    name = type(module).__name__
    original, graph = _trace(module)
    root = copy.deepcopy(original)  # to be rewritten; the other copy stays to compare with
    _refuse_unfit(root, graph)
    if in_channels is None:
        in_channels = _in_channels(root, graph)
    widths = _Rewriter(root, graph, bn, filter_scaling).rewrite()
    dynamic = fx.GraphModule(root, graph, class_name=name)
    if not any(isinstance(part, MixBatchNorm2d) for part in dynamic.modules()):
        raise ValueError(
            f"{name} has no nn.BatchNorm2d: clean and adversarial samples have branches in batch norms, so a "
            "network without them (or with frozen ones of another class) cannot be converted"
        )
    like = next(dynamic.parameters())
    if router is None:
        router = AdversarialRouter(widths, in_channels=in_channels, widths=router_widths, beta=beta)
        router.to(like.device, like.dtype)
    else:
        _check_router(router, widths, in_channels, like)
    network = AWNet(dynamic, router)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, in_channels, height, width, generator=generator).to(like.device, like.dtype)
    _compare(original, network.eval(), x)
    return network.train(module.training)


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


def _trace(module: nn.Module) -> tuple[nn.Module, fx.Graph]:
    """A copy of ``module`` in test mode and its graph, which must be the same in training mode."""
    name = type(module).__name__
    if isinstance(module, AWNet):
        raise ValueError("module is an AW-Net already")
    if hasattr(module, "route"):
        raise ValueError(f"{name} has a router of its own already; convert one of its members")
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{name} has forward hooks, which tracing would lose; remove them first")
    graphs = []
    for training in (True, False):
        module = copy.deepcopy(module).train(training)
        try:
            graphs.append(_Tracer().trace(module))
        except Exception as error:  # whatever a forward may raise when it is given proxies
            raise ValueError(
                f"{name} cannot be traced by torch.fx ({type(error).__name__}: {error}); its forward must "
                "not branch on tensors. Change that part, or build the network from the layers in awnet.nn"
            ) from error
    in_training, in_test = ([node.format_node() for node in graph.nodes] for graph in graphs)
    if in_training != in_test:
        pairs = zip(in_training, in_test, strict=False)
        where = next((line for line, other in pairs if line != other), "one does more")
        raise ValueError(
            f"{name}.forward differs between training and test mode ({where}); one graph serves both, so "
            "only modules such as nn.Dropout may depend on the mode"
        )
    images = [node.name for node in graphs[1].nodes if node.op == "placeholder"]
    if len(images) != 1:
        raise ValueError(f"{name}.forward must take one image tensor and nothing else, got {images}")
    for node in graphs[1].nodes:
        node.type = None  # annotations written as strings would keep the result from being pickled
    return module, graphs[1]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | _NormBase | MixBatchNorm2d) or super().is_leaf_module(
            m, module_qualified_name
        )


def _module(root: nn.Module, node: object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return root.get_submodule(str(node.target))
    return None


def _computes_as(module: nn.Module | None, base: type[nn.Module], *methods: str) -> bool:
    """Whether ``module`` is a ``base`` or a subclass that computes the same."""
    return isinstance(module, base) and all(
        getattr(type(module), method) is getattr(base, method) for method in methods
    )


def _is_conv(module: nn.Module | None) -> bool:
    return _computes_as(module, nn.Conv2d, "forward", "_conv_forward")


def _is_norm(module: nn.Module | None) -> bool:
    return _computes_as(module, nn.BatchNorm2d, "forward")


def _refuse_unfit(root: nn.Module, graph: fx.Graph) -> None:
    """Refuses by name every part that would come out wrong."""
    calls: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _FUNCTIONAL:
            raise ValueError(
                f"cannot convert {node.name!r}: {node.target.__name__} is called as a function, so there is "
                "no module to replace; use nn.Conv2d and nn.BatchNorm2d"
            )
        module = _module(root, node)
        if module is None:
            continue
        name = str(node.target)
        calls[name] += 1
        reason = _unfit(module, calls[name])
        if reason:
            raise ValueError(f"cannot convert {name!r} ({type(module).__name__}): {reason}")


def _unfit(module: nn.Module, calls: int) -> str | None:
    """Why this module cannot be converted, or None."""
    if isinstance(module, _InstanceNorm) or not isinstance(module, nn.Conv2d | _NormBase | MixBatchNorm2d):
        return None
    if isinstance(module, AWConv2d):
        if module.dynamic or module.bn.branches != "one":
            return "it is dynamic or has two branches already"
    elif isinstance(module, MixBatchNorm2d):
        if module.branches != "one":
            return "it has two branches already"
    elif isinstance(module, _OURS):
        return "it is a layer of an AW-Net already"
    elif isinstance(module, nn.Conv2d) and not _is_conv(module):
        return "it is a Conv2d with a forward of its own; use nn.Conv2d itself"
    elif isinstance(module, _NormBase) and not _is_norm(module):
        return "of the batch norms only nn.BatchNorm2d has a two-branch counterpart"
    elif isinstance(module, _NormBase) and module.running_mean is None:
        return "it keeps no running statistics (track_running_stats=False)"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which would be lost (weight_norm sets one too); remove them first"
    if calls > 1:
        return "it is called more than once, and an AW-Net treats every use by itself; give each use a module"
    return None


def _in_channels(root: nn.Module, graph: fx.Graph) -> int:
    image = next(node for node in graph.nodes if node.op == "placeholder")
    for node in graph.nodes:
        module = _module(root, node)
        if image in node.all_input_nodes and isinstance(module, nn.Conv2d):
            return module.in_channels
        if image in node.all_input_nodes and isinstance(module, nn.BatchNorm2d):
            return module.num_features
    raise ValueError("the image goes into no convolution directly: pass in_channels")


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
        self.stems = self._find_stems()
        self.widths: list[int] = []

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
                    node.args = (_input(node), self._filter_scale(module) if module.dynamic else None)
                    node.kwargs = {**branch, "residual": node.kwargs.get("residual")}
                elif isinstance(module, nn.BatchNorm2d | MixBatchNorm2d):
                    self._replace(node, MixBatchNorm2d.from_batch_norm(module, self.bn))
                    node.args, node.kwargs = (_input(node),), branch
                elif isinstance(module, nn.Conv2d) and self._is_dynamic(node):
                    self._replace(node, _scaled(module))
                    node.args, node.kwargs = (_input(node), self._filter_scale(module)), {}
        for node in reversed(list(self.graph.nodes)):
            if node in fused:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.widths

    def _module(self, node: object) -> nn.Module | None:
        return _module(self.root, node)

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        parent, _, child = str(node.target).rpartition(".")
        setattr(self.root.get_submodule(parent), child, module)

    def _filter_scale(self, module: nn.Conv2d) -> fx.Node:
        self.widths.append(module.out_channels)
        return self.graph.call_function(operator.getitem, (self.filter_scales, len(self.widths) - 1))

    def _find_stems(self) -> set[fx.Node]:
        """Convolutions that no other convolution feeds."""
        stems: set[fx.Node] = set()
        fed: set[fx.Node] = set()  # convolutions and all that follows them
        for node in self.graph.nodes:
            follows = any(source in fed for source in node.all_input_nodes)
            is_conv = isinstance(self._module(node), nn.Conv2d)
            if is_conv and _input(node) not in fed:  # a fused layer may have a convolution for its residual
                stems.add(node)
            if is_conv or follows:
                fed.add(node)
        return stems

    def _is_dynamic(self, conv: fx.Node) -> bool:
        module = self._module(conv)
        assert isinstance(module, nn.Conv2d)
        return self.filter_scaling and conv not in self.stems and tuple(module.kernel_size) != (1, 1)

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            if type(self._module(node)) is nn.Identity:
                node.replace_all_uses_with(_input(node))
                self.graph.erase_node(node)

    def _groups(self) -> list[_Group]:
        """Every convolution → batch norm → (addition) → (ReLU) whose inner values nobody else uses."""
        conv_of: dict[fx.Node, fx.Node] = {}  # batch norm → convolution
        for node in self.graph.nodes:
            if _is_norm(self._module(node)):
                conv = _input(node)
                if _is_conv(self._module(conv)) and len(conv.users) == 1:
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
            return user if type(self._module(user)) is nn.ReLU else None
        return user if user.target in _RELU else None

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Both operands of the plain addition of two tensors, nothing for any other node."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADD:
            return []
        named = {"input", "other"} & set(node.kwargs)
        operands = [*node.args, *(node.kwargs[key] for key in sorted(named))]
        if set(node.kwargs) - named or len(operands) != 2:  # an alpha or an out
            return []
        nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
        return nodes if len(nodes) == 2 else []

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
        self._replace(group.conv, layer)
        omega = self._filter_scale(layer) if layer.dynamic else None
        kwargs = dict(branch)
        if group.add is not None:  # asked now: the other operand may have been replaced meanwhile
            kwargs["residual"] = next(o for o in self._operands(group.add) if o is not group.norm)
        call = self.graph.call_module(str(group.conv.target), (_input(group.conv), omega), kwargs)
        group.nodes[-1].replace_all_uses_with(call)


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
def _compare(original: nn.Module, network: AWNet, x: Tensor) -> None:
    """Raises unless both give the same logits for ``x`` in test mode at ω ≡ 1."""
    try:
        expected = original(x)
    except Exception as failure:  # whatever a forward may raise on a shape that does not fit
        raise ValueError(
            f"the network fails on images {list(x.shape)}, on which it is to be compared with the converted "
            f"one ({type(failure).__name__}: {failure}); pass in_channels and image_size that fit"
        ) from failure
    if not isinstance(expected, Tensor) or expected.dim() != 2:
        got = list(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        raise ValueError(f"the network must return logits [B, K], got {got}")
    # a convolution that sums in another order differs by some 1e-6 in float32, a wrong graph by far more
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    expected = expected.nan_to_num()
    scales = [x.new_ones(len(x), width) for width in network.router.signal_widths]
    routing = Routing(None, x.new_full((len(x),), 0.5), scales)
    error = (network(x, routing=routing).nan_to_num() - expected).abs().max() / expected.abs().max().clamp(
        min=1e-6
    )
    if not error <= tolerance:
        raise ValueError(
            f"the converted network's logits are off by {error.item():.1e} of the largest one: forward does "
            "something that tracing cannot follow, such as changing in place a value that is used again"
        )
