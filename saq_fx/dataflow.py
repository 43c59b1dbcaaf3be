"""Questions about a graph's data flow, each answered in one sweep over its nodes."""

from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from saq_fx.graph import attribute_at, called_module

_ABOUT_SHAPE = {
    "size", "dim", "numel", "nelement", "ndimension", "shape", "device", "dtype", "ndim", "is_cuda", "new_zeros",
    "layout", "is_nested", "is_sparse", "is_quantized", "is_floating_point", "is_complex", "is_contiguous", "is_meta",
    "stride", "element_size", "itemsize", "nbytes", "get_device",
    torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip


def tensor_at(gm: nn.Module, path: str) -> Tensor | None:
    """The parameter or buffer at a path, None where there is none."""
    value = attribute_at(gm, path)
    return value if isinstance(value, Tensor) else None


def reads_shape_only(node: fx.Node) -> bool:
    """Whether a node takes sizes or types from its input, not values."""
    if node.op in ("call_method", "call_function") and node.target is not getattr:
        return node.target in _ABOUT_SHAPE
    return node.target is getattr and node.args[1] in _ABOUT_SHAPE


def depends_on_inputs(graph: fx.Graph, or_sizes: bool = False) -> set[fx.Node]:
    """Nodes whose values depend on the values of the graph's inputs, or on their sizes and types if these count too."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        is_fed = not dependent.isdisjoint(node.all_input_nodes)
        if node.op == "placeholder" or (is_fed and (or_sizes or not reads_shape_only(node))):
            dependent.add(node)
    return dependent


def is_constant(gm: nn.Module, node: fx.Node) -> bool:
    """Whether a value depends on no values of inputs, on no parameters and on no module that computes."""
    pending, seen = [node], {node}
    while pending:
        each = pending.pop()
        if each.op in ("placeholder", "call_module") or (each.op == "get_attr" and _is_parameter(gm, each)):
            return False
        if not reads_shape_only(each):
            fresh = [source for source in each.all_input_nodes if source not in seen]
            seen.update(fresh)
            pending.extend(fresh)
    return True


def reachable(graph: fx.Graph, starts: Iterable[fx.Node], *, forwards: bool) -> set[fx.Node]:
    """Nodes that values flow to (or, backwards, from) after leaving any of `starts`."""
    sources, found = set(starts), set[fx.Node]()
    for node in graph.nodes if forwards else reversed(graph.nodes):
        if forwards:
            reached = not (sources.isdisjoint(node.all_input_nodes) or reads_shape_only(node))
        else:
            reached = any(user in sources and not reads_shape_only(user) for user in node.users)
        if reached:
            found.add(node)
            sources.add(node)
    return found


def is_raw_input(gm: nn.Module) -> set[fx.Node]:
    """Nodes that carry the network's floating-point input, at most rearranged or rescaled without parameters."""
    graph: fx.Graph = gm.graph  # type: ignore[assignment]
    raw: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            raw.add(node)
        elif node.op == "call_module":
            is_fed_raw = all(each in raw for each in node.all_input_nodes)
            if is_fed_raw and not any(True for _ in called_module(gm, node).parameters()):
                raw.add(node)
        elif node.op in ("call_function", "call_method") and node.all_input_nodes:
            inputs = [each for each in node.all_input_nodes if each.op != "get_attr"]
            constants = (each for each in node.all_input_nodes if each.op == "get_attr")
            if (
                inputs
                and all(each in raw for each in inputs)
                and not any(_is_parameter(gm, each) for each in constants)
            ):
                raw.add(node)
    return raw


def _is_parameter(gm: nn.Module, node: fx.Node) -> bool:
    return isinstance(tensor_at(gm, str(node.target)), nn.Parameter)
