"""Modules, methods and fused attention become functional calls on explicit operands."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn
from torch.nn import functional as F

from saq_fx.attention import can_open, functional_arguments, open_functional_attention, open_multihead_attention
from saq_fx.graph import SaqGraphModule, attribute_at, called_module, graphs
from saq_fx.modes import add_training_flag, flag_path
from saq_fx.operators import operator_named, operator_of
from saq_fx.pass_base import Pass, PassResult
from saq_fx.rewriting import Tracer, as_proxies, create_node, replace_node

_CONVOLUTIONS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
_TRANSPOSED: dict[type[nn.Module], str] = {
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
_LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites every quantizable operation into one functional call with its operands as nodes.

    - `conv(x)` becomes `conv2d(x, get_attr conv.weight, get_attr conv.bias, …)`; parameter names do not change.
    - `x @ y`, `x.matmul(y)` and operator overloads become the table's canonical function.
    - `nn.MultiheadAttention` and its functional form become projections around `scaled_dot_product_attention`.
    - parameters that are one tensor under several names are read by one node.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Rewrites `gm` in place."""
        modified = [_rewrite_graph(part) for _, part in graphs(gm)]
        return PassResult(gm, any(modified))


def _rewrite_graph(gm: SaqGraphModule) -> bool:
    modified = False
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            modified |= _rewrite_module(gm, node)
        elif node.target is F.multi_head_attention_forward:
            modified |= _rewrite_functional_attention(node)
        else:
            modified |= _rewrite_call(node)
    return _merge_tied_parameters(gm) or modified


def _rewrite_module(gm: SaqGraphModule, node: fx.Node) -> bool:
    module = called_module(gm, node)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if "forward" in vars(module):  # its own, not that of its class
        return False
    kind = type(module)
    expand: Callable[..., Any]
    if kind in _CONVOLUTIONS:
        expand = _expand_convolution
    elif kind in _TRANSPOSED:
        expand = _expand_transposed_convolution
    elif kind in _LINEAR:
        expand = _expand_linear
    elif kind is nn.Embedding and module.max_norm is None:
        expand = _expand_embedding
    elif kind is nn.MultiheadAttention and can_open(module) and _has_fixed_options(node):
        expand = _expand_attention
    else:
        return False
    replace_node(gm.graph, node, lambda tracer: expand(module, _Operands(module, node, tracer)), kind)
    return True


def _has_fixed_options(attention: fx.Node) -> bool:
    """Whether a call says which weights it returns: with `need_weights=self.training` only a run does."""
    names = list(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]
    given = {**dict(zip(names, attention.args, strict=False)), **attention.kwargs}
    return not any(isinstance(given.get(name), fx.Node) for name in ("need_weights", "average_attn_weights"))


def _rewrite_functional_attention(node: fx.Node) -> bool:
    arguments = functional_arguments(node)
    if arguments is None:
        return False
    replace_node(node.graph, node, lambda tracer: open_functional_attention(**as_proxies(arguments, tracer)))
    return True


def _rewrite_call(node: fx.Node) -> bool:
    entry = operator_of(node)
    if entry is None or node.kwargs.get("out") is not None:
        return False
    args, kwargs = list(node.args), {name: value for name, value in node.kwargs.items() if name != "out"}
    if entry.name == "einsum" and len(args) == 2 and isinstance(args[1], list | tuple):
        args[1:] = list(args[1])
    while len(args) < len(entry.parameters) and entry.parameters[len(args)] in kwargs:
        args.append(kwargs.pop(entry.parameters[len(args)]))
    before = (node.op, node.target, node.args, node.kwargs)
    node.op, node.target, node.args, node.kwargs = "call_function", entry.function, tuple(args), kwargs
    return before != (node.op, node.target, node.args, node.kwargs)


class _Operands:
    """Makes the proxies that an expansion of one module call works on."""

    def __init__(self, module: nn.Module, node: fx.Node, tracer: Tracer) -> None:
        self._module, self._node, self._tracer = module, node, tracer
        self.args: tuple[Any, ...]
        self.kwargs: dict[str, Any]
        self.args, self.kwargs = as_proxies((node.args, node.kwargs), tracer)

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Proxy:
        """A node that calls a function on proxies and constants."""
        return self._proxy("call_function", function, tuple(getattr(each, "node", each) for each in args))

    @property
    def input(self) -> fx.Proxy:
        """The module's single input."""
        (value,) = (*self.args, *self.kwargs.values())
        proxy: fx.Proxy = value
        return proxy

    def parameter(self, name: str) -> fx.Proxy | None:
        """A parameter of the module, or of a module in it; None where it has none."""
        if attribute_at(self._module, name) is None:
            return None
        return self._proxy("get_attr", f"{self._node.target}.{name}")

    def training(self) -> fx.Proxy:
        """The module's training flag."""
        add_training_flag(self._module, self._module.training)
        return self._proxy("call_module", flag_path(str(self._node.target)))

    def _proxy(self, op: str, target: Any, args: tuple[Any, ...] = ()) -> fx.Proxy:
        return fx.Proxy(create_node(self._node.graph, op, target, args), self._tracer)


def _expand_convolution(conv: Any, operands: _Operands) -> Any:
    x: Any = operands.input
    padding = conv.padding
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        padding = 0
    function = operator_named(_CONVOLUTIONS[type(conv)]).function
    weight, bias = operands.parameter("weight"), operands.parameter("bias")
    return operands.call(function, x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def _expand_transposed_convolution(conv: Any, operands: _Operands) -> Any:
    function = operator_named(_TRANSPOSED[type(conv)]).function
    weight, bias = operands.parameter("weight"), operands.parameter("bias")
    x, size = _input_and_size(*operands.args, **operands.kwargs)
    padding = conv.output_padding
    if size is not None:
        padding = operands.call(output_padding, x, size, conv.stride, conv.padding, conv.kernel_size, conv.dilation)
    return operands.call(function, x, weight, bias, conv.stride, conv.padding, padding, conv.groups, conv.dilation)


def _input_and_size(input: Any, output_size: Any = None) -> tuple[Any, Any]:
    """The arguments of `forward` of a transposed convolution."""
    return input, output_size


def output_padding(
    x: Tensor,
    output_size: Sequence[int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
) -> list[int]:
    """What a transposed convolution adds on one side to give the size that it is asked for."""
    # A method that needs no object where there is a size.
    find: Any = nn.modules.conv._ConvTransposeNd._output_padding
    found: list[int] = find(None, x, list(output_size), stride, padding, kernel_size, len(kernel_size), dilation)
    return found


def _expand_linear(linear: Any, operands: _Operands) -> Any:
    return operands.call(F.linear, operands.input, operands.parameter("weight"), operands.parameter("bias"))


def _expand_embedding(table: Any, operands: _Operands) -> Any:
    options = (table.padding_idx, None, table.norm_type, table.scale_grad_by_freq, table.sparse)
    return operands.call(F.embedding, operands.input, operands.parameter("weight"), *options)


def _expand_attention(attention: Any, operands: _Operands) -> Any:
    return open_multihead_attention(attention, operands.parameter, operands.training, *operands.args, **operands.kwargs)


def _merge_tied_parameters(gm: SaqGraphModule) -> bool:
    first: dict[int, fx.Node] = {}
    modified = False
    for node in list(gm.graph.nodes):
        if node.op != "get_attr":
            continue
        kept = first.setdefault(id(attribute_at(gm, str(node.target))), node)
        if kept is not node:
            if all(user.target is F.embedding for user in kept.users):
                # Layers are named by their weights, and a table tied to a layer's weight is none at first.
                kept.target = node.target
            node.replace_all_uses_with(kept)
            gm.graph.erase_node(node)
            modified = True
    return modified
