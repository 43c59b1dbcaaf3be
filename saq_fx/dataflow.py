"""Questions about a graph's data flow, each answered in one sweep over its nodes."""

from collections.abc import Iterable
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn

_ABOUT_SHAPE = {
    "size",
    "dim",
    "numel",
    "ndimension",
    "shape",
    "device",
    "dtype",
    "ndim",
    "is_cuda",
    "new_zeros",
}


def tensor_at(gm: nn.Module, path: str) -> Tensor | None:
    """The parameter or buffer at a path, None where there is none."""
    owner, _, name = path.rpartition(".")
    try:
        value = getattr(gm.get_submodule(owner), name)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node takes sizes or types from its input, not values."""
    if node.op == "call_method":
        return node.target in _ABOUT_SHAPE
    return node.target is getattr and node.args[1] in _ABOUT_SHAPE


def depends_on_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on the values of the graph's inputs."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (
            not reads_shape_only(node) and any(each in dependent for each in node.all_input_nodes)
        ):
            dependent.add(node)
    return dependent


def reachable(graph: fx.Graph, starts: Iterable[fx.Node], *, forwards: bool) -> set[fx.Node]:
    """Nodes that values flow to (or, backwards, from) after leaving any of `starts`."""
    start: Any = object()
    flow: nx.DiGraph[Any] = nx.DiGraph()
    flow.add_node(start)
    for node in graph.nodes:
        sources = [] if reads_shape_only(node) else node.all_input_nodes
        flow.add_edges_from((source, node) if forwards else (node, source) for source in sources)
    for node in starts:
        if node in flow:
            flow.add_edges_from((start, neighbour) for neighbour in list(flow.successors(node)))
    return set(nx.descendants(flow, start))


def is_raw_input(gm: nn.Module) -> set[fx.Node]:
    """Nodes that carry the network's floating-point input, at most rearranged or rescaled without parameters."""
    graph: fx.Graph = gm.graph  # type: ignore[assignment]
    raw: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            raw.add(node)
        elif node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if all(each in raw for each in node.all_input_nodes) and not any(True for _ in module.parameters()):
                raw.add(node)
        elif node.op in ("call_function", "call_method") and node.all_input_nodes:
            inputs = [each for each in node.all_input_nodes if each.op != "get_attr" or _is_parameter(gm, each)]
            if inputs and all(each in raw for each in inputs):
                raw.add(node)
    return raw


def _is_parameter(gm: nn.Module, node: fx.Node) -> bool:
    return isinstance(tensor_at(gm, str(node.target)), nn.Parameter)
