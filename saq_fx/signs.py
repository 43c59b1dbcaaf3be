"""Which values of a graph cannot be negative, decided from what produces them (docs/method.md).

What is not known to keep a value non-negative makes it signed: a signed quantizer wastes a bit on what is not, an
unsigned one turns everything below zero into zero.
"""

from collections.abc import Collection
from typing import Any

from torch import fx, nn

from saq_fx.dataflow import reads_shape_only
from saq_fx.graph import called_module
from saq_fx.mutation import SharedMemory, nodes_in, written_by
from saq_fx.operation_names import operation_name

_NONNEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softplus, nn.Softmax2d)
_PRESERVING_MODULES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad2d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
)
_NONNEGATIVE = {
    "relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "exp", "abs", "absolute", "square",
    "attention_probabilities", "zeros", "zeros_like", "zero", "ones", "ones_like",
}  # fmt: skip
# Non-negative if all tensors and numbers that they are given are.
_ARITHMETIC = {"add", "mul", "multiply", "div", "divide", "truediv", "true_divide", "sqrt"}
# Non-negative if all tensors that they are given are; numbers are axes and sizes.
_PRESERVING = {
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "amax", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "cat", "chunk", "clone", "concat", "contiguous", "detach", "dropout", "dropout2d",
    "expand", "expand_as", "flatten", "float", "getitem", "half", "max", "max_pool1d", "max_pool2d", "max_pool3d",
    "mean", "movedim", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "repeat", "repeat_interleave",
    "reshape", "roll", "split", "squeeze", "stack", "sum", "swapaxes", "t", "to", "transpose", "type_as", "unbind",
    "unflatten", "unsqueeze", "view",
}  # fmt: skip
# What else is written into a tensor: its place among the arguments, and its name.
_WRITTEN_VALUE = {
    "copy": (1, "src"),
    "fill": (1, "value"),
    "masked_fill": (2, "value"),
    "setitem": (2, "value"),
}
_LOWER_BOUND = {"clamp": (1, "min"), "clamp_min": (1, "min"), "clip": (1, "min"), "hardtanh": (1, "min_val")}


def has_nonnegative_values(gm: nn.Module) -> set[fx.Node]:
    """Nodes whose values cannot be negative, at any time: what later writes to them in place counts."""
    graph: fx.Graph = gm.graph  # type: ignore[assignment]
    nonnegative: set[fx.Node] = set()
    memory: SharedMemory | None = None
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        written = written_by(gm, node)
        if written and not _is_nonnegative(gm, node, nonnegative, written):
            memory = memory or SharedMemory(gm)
            nonnegative -= memory.with_any_of(written)
        if _is_nonnegative(gm, node, nonnegative):
            nonnegative.add(node)
    return nonnegative


def _is_nonnegative(gm: nn.Module, node: fx.Node, nonnegative: set[fx.Node], assumed: Collection[fx.Node] = ()) -> bool:
    """Whether a node's value cannot be negative, given which others cannot, and those `assumed` not to be."""
    if node.op == "call_module":
        module = called_module(gm, node)
        if isinstance(module, nn.Hardtanh) and not isinstance(module, nn.ReLU6):
            return bool(module.min_val >= 0)
        if isinstance(module, _NONNEGATIVE_MODULES):
            return True
        tensors = node.all_input_nodes if isinstance(module, _PRESERVING_MODULES) else []
        numbers: list[Any] = []
    else:
        name = operation_name(node)
        if name in _NONNEGATIVE or (name in _LOWER_BOUND and _is_number(_argument(node, *_LOWER_BOUND[name]))):
            return True
        tensors, numbers = _combined(node, name)
    tensors = [each for each in tensors if not (reads_shape_only(each) or _is_flag(each))]
    known = all(each in nonnegative or each in assumed for each in tensors)
    return bool(tensors) and known and all(_is_number(each) for each in numbers)


def _combined(node: fx.Node, name: str) -> tuple[list[fx.Node], list[Any]]:
    """The tensors and the numbers that an operation's values come from; no tensors where it may change signs."""
    if name in _ARITHMETIC:
        given = [*node.args, *node.kwargs.values()]
        return node.all_input_nodes, [each for each in given if isinstance(each, int | float | complex)]
    if name in _WRITTEN_VALUE:
        value = _argument(node, *_WRITTEN_VALUE[name])
        return nodes_in((node.args[0], value)), [] if isinstance(value, fx.Node) else [value]
    if name == "pad":
        value = _argument(node, 3, "value")
        return node.all_input_nodes, [] if value is None else [value]
    if name == "where":
        values = [_argument(node, 0 if node.op == "call_method" else 1, "input"), _argument(node, 2, "other")]
        return nodes_in(values), [each for each in values if not isinstance(each, fx.Node)]
    return (node.all_input_nodes if name in _PRESERVING else []), []


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _is_number(value: Any) -> bool:
    """Whether an argument is a number that is not negative."""
    return isinstance(value, int | float) and value >= 0


def _is_flag(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).endswith("training_flag")
