"""Rewrites a traced CNN: its convolutions and batch norms become the layers of an AW-Net."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from awnet.nn.layers import Activation, AWConv2d, Branches, FilterScaledConv2d, MixBatchNorm2d
from awnet.nn.structure import has_hooks

_FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    F.silu: "silu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
}
_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.LeakyReLU: "leaky_relu",
}
_ADD: set[Any] = {torch.add, operator.add, operator.iadd, "add", "add_"}


def module_of(root: nn.Module, node: object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return root.get_submodule(str(node.target))
    return None


def computes_as(module: nn.Module | None, base: type[nn.Module], *methods: str) -> bool:
    """Whether ``module`` is a ``base``, or a subclass, that computes the same and runs no hooks."""
    return (
        isinstance(module, base)
        and not has_hooks(module)
        and all(
            getattr(type(module), method) is getattr(base, method) and method not in module.__dict__
            for method in methods
        )
    )


def is_conv(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    return (
        computes_as(module, nn.Conv2d, "forward", "_conv_forward")
        and module is not None
        and not parametrize.is_parametrized(module)
    )


def is_norm(module: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    return computes_as(module, nn.BatchNorm2d, "forward")


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Registers ``new`` everywhere instead of ``old``."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


class ConvertedNorm(NamedTuple):
    """The replacement of a batch norm."""

    mixed: MixBatchNorm2d
    bias: Tensor | None = None
    """Bias of the convolution before it, which was subtracted from the running mean."""


class FusedGroup(NamedTuple):
    """The nodes that one fused call replaces."""

    conv: fx.Node
    norm: fx.Node
    add: fx.Node | None
    last: fx.Node | None = None
    """The node of the activation."""
    activation: Activation = None

    @property
    def nodes(self) -> list[fx.Node]:
        """In the order of execution; the value of the last one is the value of the group."""
        return [node for node in (self.conv, self.norm, self.add, self.last) if node is not None]


class Rewriter:
    """Replaces convolutions and batch norms, in the graph and among the modules of ``root``."""

    def __init__(self, root: nn.Module, graph: fx.Graph, bn: Branches, filter_scaling: bool) -> None:
        self.root = root
        self.graph = graph
        self.bn: Branches = bn
        self.filter_scaling = filter_scaling
        self.calls = Counter(id(module) for node in graph.nodes if (module := self._module(node)) is not None)
        self.stems = self._find_stems()
        self.widths: list[int] = []
        self.norms: dict[str, ConvertedNorm] = {}
        """By the name of the batch norm."""

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
                    self.norms[f"{node.target}.bn"] = ConvertedNorm(module.bn)
                    node.args = (input_of(node), self._filter_scale(module) if module.dynamic else None)
                    node.kwargs = {**branch, "residual": node.kwargs.get("residual")}
                elif isinstance(module, nn.BatchNorm2d | MixBatchNorm2d):
                    if str(node.target) not in self.norms:
                        mixed = MixBatchNorm2d.from_batch_norm(module, self.bn)
                        self._replace(node, mixed)
                        self.norms[str(node.target)] = ConvertedNorm(mixed)
                    node.args, node.kwargs = (input_of(node),), branch
                elif isinstance(module, nn.Conv2d) and (str(node.target) in scales or self._is_dynamic(node)):
                    if str(node.target) not in scales:
                        self._replace(node, _scaled(module))
                        scales[str(node.target)] = self._filter_scale(module)
                    node.args, node.kwargs = (input_of(node), scales[str(node.target)]), {}
        for node in reversed(list(self.graph.nodes)):
            if node in fused:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.widths

    def _module(self, node: object) -> nn.Module | None:
        return module_of(self.root, node)

    def _replace(self, node: fx.Node, module: nn.Module) -> None:
        replace_module(self.root, self.root.get_submodule(str(node.target)), module)

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
            if is_conv and input_of(node) not in fed:  # a fused layer may have a convolution for its residual
                stems.add(node)
            if follows or (module and any(isinstance(part, nn.Conv2d) for part in module.modules())):
                fed.add(node)
        return stems

    def _is_dynamic(self, conv: fx.Node) -> bool:
        module = self._module(conv)
        assert isinstance(module, nn.Conv2d)
        plain = is_conv(module) or isinstance(module, AWConv2d)
        return (
            self.filter_scaling and plain and conv not in self.stems and tuple(module.kernel_size) != (1, 1)
        )

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            if is_exactly(self._module(node), nn.Identity):
                node.replace_all_uses_with(input_of(node))
                self.graph.erase_node(node)

    def _groups(self) -> list[FusedGroup]:
        """Every convolution → batch norm → (addition) → (activation) with inner values of no other users."""
        conv_of: dict[fx.Node, fx.Node] = {}  # batch norm → convolution
        for node in self.graph.nodes:
            norm_module = self._module(node)
            if is_norm(norm_module) and self.calls[id(norm_module)] == 1:
                conv = input_of(node)
                module = self._module(conv)
                if is_conv(module) and self.calls[id(module)] == 1 and len(conv.users) == 1:
                    conv_of[node] = conv
        groups: dict[fx.Node, FusedGroup] = {}  # by batch norm
        for node in self.graph.nodes:
            operands = self._operands(node)
            norms = [o for o in operands if o in conv_of and o not in groups and len(o.users) == 1]
            if norms and operands[0] is not operands[1]:
                # of two paths the dynamic one includes the addition: a 1×1 shortcut is its residual
                norm = next((n for n in norms if self._is_dynamic(conv_of[n])), norms[0])
                groups[norm] = FusedGroup(conv_of[norm], norm, node, *self._activation_after(node))
        for norm, conv in conv_of.items():
            if norm not in groups:
                groups[norm] = FusedGroup(conv, norm, None, *self._activation_after(norm))
        return list(groups.values())

    def _activation_after(self, node: fx.Node) -> tuple[fx.Node | None, Activation]:
        """The activation that is the only user of ``node``, and its name, if a fused layer has it."""
        if len(node.users) != 1:
            return None, None
        user = next(iter(node.users))
        if user.op == "call_module":
            module = self._module(user)
            assert module is not None
            name = _MODULES.get(type(module)) if is_exactly(module, type(module)) else None
            options = vars(module)
        else:
            name, options = _FUNCTIONS.get(user.target), _options_of(user)
        if name == "gelu" and options.get("approximate", "none") != "none":
            name = None
        if name == "leaky_relu" and options.get("negative_slope", 0.01) != 0.01:
            name = None
        return (None, None) if name is None else (user, name)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """Both operands if the node is a plain addition of two tensors of equal shape, else nothing."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADD:
            return []
        named = {"input", "other"} & set(node.kwargs)
        operands = [*node.args, *(node.kwargs[key] for key in sorted(named))]
        if set(node.kwargs) - named or len(operands) != 2:  # an alpha or an out
            return []
        nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
        shapes = [node.meta.get("shape") for node in nodes]
        return nodes if len(nodes) == 2 and shapes[0] and shapes[0] == shapes[1] else []

    def _fuse(self, group: FusedGroup, branch: dict[str, Any]) -> None:
        conv, norm = self._module(group.conv), self._module(group.norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        dynamic = self._is_dynamic(group.conv)
        layer = AWConv2d(**_geometry(conv), dynamic=dynamic, activation=group.activation, device="meta")
        layer.weight = conv.weight  # the Parameter itself: weights tied in the original stay tied
        layer.bn = MixBatchNorm2d.from_batch_norm(norm, self.bn, conv.bias)
        self.norms[str(group.norm.target)] = ConvertedNorm(layer.bn, conv.bias)
        self._replace(group.conv, layer)
        filter_scale = self._filter_scale(layer) if layer.dynamic else None
        kwargs = dict(branch)
        if group.add is not None:  # now, since the other operand may have been replaced
            kwargs["residual"] = next(o for o in self._operands(group.add) if o is not group.norm)
        call = self.graph.call_module(str(group.conv.target), (input_of(group.conv), filter_scale), kwargs)
        call.meta.update(group.nodes[-1].meta)
        group.nodes[-1].replace_all_uses_with(call)


def _options_of(call: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an activation, by name."""
    return dict(zip(("input", "negative_slope", "inplace"), call.args, strict=False)) | dict(call.kwargs)


def is_exactly(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is exactly a ``kind``, without hooks or a replaced forward."""
    return type(module) is kind and not has_hooks(module) and "forward" not in module.__dict__


def input_of(node: fx.Node) -> fx.Node:
    """The input of a convolution, batch norm or identity."""
    value = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(value, fx.Node)
    return value


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments that make a convolution of the same channels and pixels."""
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
    return {name: getattr(conv, name) for name in names.split()}


def _scaled(conv: nn.Conv2d) -> FilterScaledConv2d:
    layer = FilterScaledConv2d(**_geometry(conv), bias=conv.bias is not None, device="meta")
    layer.weight, layer.bias = conv.weight, conv.bias
    return layer
