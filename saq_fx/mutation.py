"""Which nodes of a graph write to values in place, and which values share their memory."""

from collections.abc import Iterable
from typing import Any

import networkx as nx
from torch import fx, nn

from saq_fx.dataflow import tensor_at
from saq_fx.graph import called_module
from saq_fx.operation_names import operation_name, writes_first
from saq_fx.operators import operator_of

# Some of what may return a view of what it was given.
VIEWS = {
    "chunk", "contiguous", "detach", "dropout", "expand", "expand_as", "flatten", "float", "getattr", "getitem", "half",
    "movedim", "narrow", "permute", "reshape", "select", "select_mode", "setitem", "split", "squeeze", "swapaxes", "t",
    "to", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "view",
}  # fmt: skip
# What makes new memory; all else is taken for something that may return a view of what it was given.
MAKES_NEW = {
    "abs", "absolute", "add", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "amax", "amin",
    "attention_probabilities", "avg_pool1d", "avg_pool2d", "avg_pool3d", "batch_norm", "bernoulli", "cat", "ceil",
    "clamp", "clip", "clone", "concat", "concatenate", "cos", "cumsum", "div", "divide", "elu", "empty_like", "eq",
    "erf", "exp", "floor", "floor_divide", "floordiv", "full_like", "ge", "gelu", "group_norm", "gt", "hardsigmoid",
    "hardswish", "hardtanh", "index_select", "instance_norm", "interpolate", "layer_norm", "le", "leaky_relu", "log",
    "log_softmax", "lt", "masked_fill", "max_pool1d", "max_pool2d", "max_pool3d", "maximum", "mean", "minimum", "mish",
    "mul", "multiply", "ne", "neg", "norm", "normalize", "ones_like", "pixel_shuffle", "pixel_unshuffle", "pow",
    "rand_like", "randn_like", "reciprocal", "relu", "relu6", "repeat", "repeat_interleave", "rms_norm", "roll",
    "round", "rsqrt", "rsub", "sigmoid", "sign", "silu", "sin", "softmax", "softplus", "sqrt", "square", "stack", "std",
    "sub", "subtract", "sum", "tanh", "tril", "triu", "true_divide", "truediv", "var", "where", "zeros_like",
}  # fmt: skip


def written_by(gm: nn.Module, node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a node changes in place."""
    if node.op == "call_module":
        module = called_module(gm, node)
        # Not of the module itself: what a module lacks it looks for long.
        in_place = vars(module).get("inplace", getattr(type(module), "inplace", False))
        return node.all_input_nodes if in_place is True else []
    if node.op not in ("call_function", "call_method"):
        return []
    written = nodes_in(node.kwargs["out"]) if "out" in node.kwargs else []
    if writes_first(node):
        first: Any = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        written += nodes_in(first)
    return written


def nodes_in(value: Any) -> list[fx.Node]:
    """All nodes of nested arguments."""
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def written_parameters(gm: nn.Module) -> list[nn.Parameter]:
    """The parameters that a graph writes to in place, through a view or not (moving averages)."""
    graph: fx.Graph = gm.graph  # type: ignore[assignment]
    pending = [each for node in graph.nodes for each in written_by(gm, node)]
    seen = set(pending)
    while pending:
        fresh = [each for each in _may_be_view_of(gm, pending.pop()) if each not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    tensors = [tensor_at(gm, str(node.target)) for node in graph.nodes if node.op == "get_attr" and node in seen]
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


class SharedMemory:
    """Which nodes of a graph may be views of each other."""

    def __init__(self, gm: nn.Module) -> None:
        graph: fx.Graph = gm.graph  # type: ignore[assignment]
        self._views: nx.Graph[fx.Node] = nx.Graph()
        self._views.add_nodes_from(graph.nodes)
        for node in graph.nodes:
            self._views.add_edges_from((node, source) for source in _may_be_view_of(gm, node))

    def with_any_of(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes that may share memory with any of these, and these."""
        return {each for node in nodes for each in nx.node_connected_component(self._views, node)}


def _may_be_view_of(gm: nn.Module, node: fx.Node) -> list[fx.Node]:
    written = written_by(gm, node)
    if written or node.op == "output":
        return written
    if node.op == "call_module":
        has_parameters = any(True for _ in called_module(gm, node).parameters())
        return [] if has_parameters else node.all_input_nodes
    return [] if operation_name(node) in MAKES_NEW or operator_of(node) is not None else node.all_input_nodes
