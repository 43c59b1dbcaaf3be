"""Questions about a graph's data flow, each answered in one sweep over its nodes."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from saq_fx.attention import attention_probabilities
from saq_fx.graph import attribute_at

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


def depends_on_inputs(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose values depend on the values of the graph's inputs."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        is_fed = not dependent.isdisjoint(node.all_input_nodes)
        if node.op == "placeholder" or (is_fed and not reads_shape_only(node)):
            dependent.add(node)
    return dependent


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
            if is_fed_raw and not any(True for _ in gm.get_submodule(str(node.target)).parameters()):
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
_NONNEGATIVE_FUNCTIONS = {
    F.relu, F.relu6, F.relu_, F.sigmoid, F.hardsigmoid, F.softmax, F.softplus, torch.relu, torch.relu_,
    torch.sigmoid, torch.softmax, torch.exp, torch.abs, torch.square, attention_probabilities,
}  # fmt: skip
_NONNEGATIVE_METHODS = {"relu", "relu_", "sigmoid", "sigmoid_", "softmax", "exp", "abs", "square"}
_PRESERVING_FUNCTIONS = {
    operator.add, operator.mul, operator.iadd, operator.imul, operator.getitem, operator.truediv, torch.add,
    torch.mul, torch.cat, torch.concat, torch.stack, torch.flatten, torch.reshape, torch.permute, torch.transpose,
    torch.chunk, torch.split, torch.mean, torch.sum, torch.amax, torch.max, torch.squeeze, torch.unsqueeze,
    torch.max_pool2d, torch.adaptive_avg_pool1d, torch.sqrt, torch.narrow, torch.unbind, torch.roll,
    F.dropout, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d,
    F.dropout2d, F.pixel_shuffle, F.pixel_unshuffle,
}  # fmt: skip
_PRESERVING_METHODS = {
    "add", "add_", "mul", "mul_", "div", "div_", "view", "reshape", "flatten", "permute", "transpose", "contiguous",
    "chunk", "split", "mean", "sum", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "unflatten", "movedim",
    "to", "float", "half", "type_as", "clone", "unbind", "roll", "swapaxes", "sqrt", "amax", "max", "repeat_interleave",
    "narrow", "detach", "t",
}  # fmt: skip


def has_nonnegative_values(gm: nn.Module) -> set[fx.Node]:
    """Nodes whose values cannot be negative, decided from what produces them (docs/method.md)."""
    graph: fx.Graph = gm.graph  # type: ignore[assignment]
    nonnegative: set[fx.Node] = set()
    for node in graph.nodes:
        if _makes_nonnegative(gm, node) or (_preserves_sign(gm, node) and _operands_nonnegative(node, nonnegative)):
            nonnegative.add(node)
    return nonnegative


def _makes_nonnegative(gm: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        module: Any = gm.get_submodule(str(node.target))
        if isinstance(module, nn.ReLU6):
            return True
        if isinstance(module, nn.Hardtanh):
            return bool(module.min_val >= 0)
        return isinstance(module, _NONNEGATIVE_MODULES)
    if node.op == "call_function":
        if node.target is F.hardtanh:
            bound = node.args[1] if len(node.args) > 1 else node.kwargs.get("min_val", -1.0)
            return isinstance(bound, int | float) and bound >= 0
        return node.target in _NONNEGATIVE_FUNCTIONS
    return node.op == "call_method" and node.target in _NONNEGATIVE_METHODS


def _preserves_sign(gm: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), _PRESERVING_MODULES)
    if node.op == "call_function":
        return node.target in _PRESERVING_FUNCTIONS or (node.target is F.pad and _pads_nonnegative(node))
    return node.op == "call_method" and node.target in _PRESERVING_METHODS


def _pads_nonnegative(node: fx.Node) -> bool:
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return value is None or (isinstance(value, int | float) and value >= 0)


def _operands_nonnegative(node: fx.Node, nonnegative: set[fx.Node]) -> bool:
    """Whether everything that a sign-preserving node combines is non-negative; sizes and flags do not count."""
    tensors = [each for each in node.all_input_nodes if not (reads_shape_only(each) or _is_flag(each))]
    scalars = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, float)]
    arithmetic = node.target in (
        operator.add,
        operator.mul,
        operator.iadd,
        operator.imul,
        operator.truediv,
        "add",
        "mul",
    )
    numbers = [value for value in node.args if isinstance(value, int | float)] if arithmetic else scalars
    return bool(tensors) and all(each in nonnegative for each in tensors) and all(value >= 0 for value in numbers)


def _is_flag(node: fx.Node) -> bool:
    return node.op == "call_module" and str(node.target).endswith("training_flag")
