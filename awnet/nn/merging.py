"""One torch.fx graph of a forward pass for train mode and eval mode.

The network is traced in both modes. Where the two graphs differ (``F.dropout(x, p, self.training)``,
stochastic depth), a :class:`~awnet.nn.tracing.ModeSwitch` holds both versions.
"""

from __future__ import annotations

import copy
import difflib
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn

from awnet.nn.tracing import PREFIX, Guard, ModeSwitch, Tracer, Untraceable, defined_at, raised_at, where_of


def trace(
    network: nn.Module, x: Tensor, is_leaf: Callable[[nn.Module], bool], keeps: Callable[[nn.Module], bool]
) -> fx.Graph:
    """The graph of ``network``, which is in eval mode, for both modes.

    Modules that the graph needs and ``network`` lacks are added to it.

    Args:
        x: images [B, C, H, W] to trace with, B at least 2.
        is_leaf: whether a module is called as it is.
        keeps: whether a module must be in the graphs of both modes.

    Raises:
        ValueError: it cannot be traced; the message names the file and line.
    """
    name = type(network).__name__
    leaves: set[str] = set()
    guards: dict[Any, Guard] = {}
    while True:
        graphs = []
        for training in (True, False):
            part = copy.deepcopy(network).train() if training else network
            tracer = Tracer(lambda m, path: path in leaves or is_leaf(m), x, guards)
            try:
                graphs.append((part, tracer.trace_network(part)))
            except Exception as error:  # a forward that is called with symbols may raise anything
                retry = next(
                    (path for path in tracer.failed_in or () if _can_be_leaf(network, path, keeps)), None
                )
                if retry is None or retry in leaves:
                    raise ValueError(
                        f"{name} cannot be traced by torch.fx: {raised_at(error)}: "
                        f"{_message(error)}. Change that part, or use the layers in awnet.nn"
                    ) from error
                leaves.add(retry)
                break
        else:
            (training_network, training_graph), (_, graph) = graphs
            break
    for guard in guards.values():
        network.add_module(guard.name, guard)
    _Merger(network, graph, training_network, training_graph, keeps).merge()
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    for guard in guards.values():
        if guard.name not in used:
            delattr(network, guard.name)
    return graph


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, Untraceable) else f"{type(error).__name__}: {error}"


def _can_be_leaf(network: nn.Module, path: str, keeps: Callable[[nn.Module], bool]) -> bool:
    """Whether a module that cannot be traced through can be called instead."""
    return path + "." != PREFIX and not any(keeps(m) for m in network.get_submodule(path).modules())


class _Region:
    """Where the graphs of the modes differ: the nodes of each mode between two nodes that both have."""

    def __init__(self, training: list[fx.Node], evaluation: list[fx.Node], before: fx.Node) -> None:
        self.nodes = {True: training, False: evaluation}
        self.before = before  # the next node that both have, in the graph of eval mode
        self.outputs: list[tuple[fx.Node | None, fx.Node | None]] = []
        self.switch: fx.Node | None = None


class _Merger:
    """Turns the graph of eval mode into one for both modes."""

    def __init__(
        self,
        network: nn.Module,
        graph: fx.Graph,
        training_network: nn.Module,
        training_graph: fx.Graph,
        keeps: Callable[[nn.Module], bool],
    ) -> None:
        self.network = network
        self.graph = graph
        self.training_network = training_network
        self.training_nodes = list(training_graph.nodes)
        self.eval_nodes = list(graph.nodes)
        self.keeps = keeps

    def merge(self) -> None:
        training_keys = [self._key(node, self.training_network) for node in self.training_nodes]
        eval_keys = [self._key(node, self.network) for node in self.eval_nodes]
        if training_keys[-1] != eval_keys[-1]:
            raise ValueError(
                f"{type(self.network).__name__}.forward, defined at "
                f"{defined_at(type(self.network).forward)}, returns something else in train mode than in "
                "eval mode (an auxiliary classifier's logits?); it must return logits [B, K] in both"
            )
        self.eval_of: dict[fx.Node, fx.Node] = {}
        self.regions: list[_Region] = []
        self.region_of: dict[fx.Node, _Region] = {}
        for tag, i, i_end, j, j_end in difflib.SequenceMatcher(
            None, training_keys, eval_keys, autojunk=False
        ).get_opcodes():
            if tag == "equal":
                self.eval_of.update(zip(self.training_nodes[i:i_end], self.eval_nodes[j:j_end], strict=True))
            else:
                self._add_region(
                    self.training_nodes[i:i_end], self.eval_nodes[j:j_end], self.eval_nodes[j_end]
                )
        self._find_outputs()
        self.switched: dict[tuple[fx.Node | None, fx.Node | None], fx.Node] = {}
        for region in sorted(self.regions, key=lambda region: self.eval_nodes.index(region.before)):
            self._insert(region)
        self._redirect()
        for node in reversed(self.eval_nodes):
            if node in self.region_of and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()

    def _key(self, node: fx.Node, network: nn.Module) -> str:
        """A key that is equal for nodes that compute the same function of their inputs."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: None)
        constant = ""
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            constant = repr(getattr(network, str(node.target)).tolist())
        return f"{node.op} {node._pretty_print_target(node.target)} {args} {kwargs} {constant}"

    def _add_region(self, training: list[fx.Node], evaluation: list[fx.Node], before: fx.Node) -> _Region:
        region = _Region(training, evaluation, before)
        for node in [*training, *evaluation]:
            self.region_of[node] = region
            module = self.network.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is not None and any(self.keeps(part) for part in module.modules()):
                mode = "train" if node in training else "eval"
                raise ValueError(
                    f"cannot convert {str(node.target)!r} ({type(module).__name__}) at {where_of(node)}: it "
                    f"is called so in {mode} mode only, and a batch norm must be in the graphs of both modes"
                )
        self.regions.append(region)
        return region

    def _pairs(self) -> Iterator[tuple[fx.Node, fx.Node, fx.Node]]:
        """(train value, eval value, user) for each operand of a common node that differs between modes."""
        for training, evaluation in self.eval_of.items():
            for training_value, eval_value in zip(_operands(training), _operands(evaluation), strict=True):
                if self.eval_of.get(training_value) is not eval_value:
                    yield training_value, eval_value, evaluation

    def _find_outputs(self) -> None:
        positions = {node: i for i, node in enumerate(self.eval_nodes)}

        def position(region: _Region) -> int:
            return positions[region.before]

        for training_value, eval_value, user in list(self._pairs()):
            sources = [
                self.region_of[node] for node in (training_value, eval_value) if node in self.region_of
            ]
            region = max(sources, key=position) if sources else self._add_region([], [], user)
            if (training_value, eval_value) not in region.outputs:
                region.outputs.append((training_value, eval_value))
        for region in list(self.regions):  # values that later regions read from earlier ones
            for training in (True, False):
                for node in region.nodes[training]:
                    for source in node.all_input_nodes:
                        origin = self.region_of.get(source)
                        pair = (source, None) if training else (None, source)
                        if origin not in (None, region) and pair not in origin.outputs:
                            origin.outputs.append(pair)

    def _outside(self, node: fx.Node, training: bool) -> fx.Node:
        """The merged graph's node for a value that a region reads."""
        if training and node in self.eval_of:
            return self.eval_of[node]
        if node not in self.region_of:
            return node
        return self.switched[(node, None) if training else (None, node)]

    def _insert(self, region: _Region) -> None:
        inputs: list[fx.Node] = []
        with self.graph.inserting_before(region.before):
            parts = [self._part(region, training, inputs) for training in (True, False)]
            for graph, placeholders in parts:
                _extend_placeholders(graph, placeholders, len(inputs))
            training_part, eval_part = (
                fx.GraphModule(nn.Module(), graph, class_name="Part") for graph, _ in parts
            )
            name = next(n for i in range(10**6) if not hasattr(self.network, n := f"_mode_{i}"))
            self.network.add_module(name, ModeSwitch(training_part, eval_part).eval())
            region.switch = self.graph.call_module(name, tuple(inputs))
            region.switch.meta["where"] = next(
                (where_of(node) for nodes in region.nodes.values() for node in nodes), where_of(region.before)
            )
            for i, pair in enumerate(region.outputs):
                self.switched[pair] = self.graph.call_function(operator.getitem, (region.switch, i))
                self.switched[pair].meta.update((pair[1] or pair[0]).meta)  # type: ignore[union-attr]

    def _part(self, region: _Region, training: bool, inputs: list[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
        """One mode's graph of a region, and its placeholders; appends the values it reads to ``inputs``."""
        graph = fx.Graph()
        placeholders: list[fx.Node] = []
        inner: dict[fx.Node, fx.Node] = {}

        def value(node: fx.Node) -> fx.Node:
            if node in inner:
                return inner[node]
            outside = self._outside(node, training)
            if outside not in inputs:
                inputs.append(outside)
            index = inputs.index(outside)
            _extend_placeholders(graph, placeholders, index + 1)
            return placeholders[index]

        def read(target: str) -> fx.Node:
            """A tensor or module, read in the outer graph, so that its state keeps its name."""
            inputs.append(self.graph.get_attr(target))
            _extend_placeholders(graph, placeholders, len(inputs))
            return placeholders[-1]

        for node in region.nodes[training]:
            target = str(node.target)
            if node.op == "get_attr":
                if training and target.startswith("_tensor_constant"):
                    constant = getattr(self.training_network, target)
                    target = next(n for i in range(10**6) if not hasattr(self.network, n := f"_constant_{i}"))
                    setattr(self.network, target, constant)
                inner[node] = read(target)
            elif node.op == "call_module":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                inner[node] = graph.call_method("__call__", (read(target), *args), kwargs)
            else:
                inner[node] = graph.node_copy(node, value)
        result = tuple(
            None if pair[not training] is None else value(pair[not training])  # type: ignore[arg-type]
            for pair in region.outputs
        )
        graph.output(result)
        return graph, placeholders

    def _redirect(self) -> None:
        """Replaces operands that the modes compute differently by the outputs of the switches."""
        for node, evaluation in self.eval_of.items():
            sources = iter(list(_operands(node)))

            def switched_operand(operand: fx.Node, sources: Iterator[fx.Node] = sources) -> fx.Node:
                return self.switched.get((next(sources), operand), operand)

            evaluation.args = fx.node.map_arg(evaluation.args, switched_operand)
            evaluation.kwargs = fx.node.map_arg(evaluation.kwargs, switched_operand)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node in order, with repetitions."""
    operands: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), operands.append)
    return operands


def _extend_placeholders(graph: fx.Graph, placeholders: list[fx.Node], count: int) -> None:
    """Adds placeholders before all other nodes of ``graph`` until there are ``count``."""
    for i in range(len(placeholders), count):
        with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before():
            placeholders.append(graph.placeholder(f"value_{i}"))
