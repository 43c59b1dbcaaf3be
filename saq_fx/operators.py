"""The operator table: every operation that is quantized and counted, one entry each.

An entry names the function's arguments in order, which two of them are multiplied, and the formula of its MACs (one
MAC is one multiply and one add). To support a new operation, add an entry; nothing else knows operators by name.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional as F

from saq_fx.annotation import Shape
from saq_fx.errors import PassError
from saq_fx.operation_names import function_name, operation_name
from saq_fx.runtime import apply_function

MacFormula = Callable[[Sequence[Any], Shape], int]


@dataclass(frozen=True)
class Operator:
    """One quantizable operation.

    Args:
        name: what reports call it; "embedding" multiplies nothing, and only its weight can be quantized.
        function: the canonical function that nodes of this operation call.
        parameters: names of its arguments, in order.
        activation, weight: positions of the two multiplied operands. Either may be an activation in a given call.
        macs: (arguments with shapes in place of tensors, output shape) -> MACs.
        channel_axis: axis of output channels in a weight operand; None where it depends on the call.
        aliases, methods: other functions and tensor methods that mean the same.
    """

    name: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    activation: int
    weight: int
    macs: MacFormula
    channel_axis: int | None = 0
    aliases: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()


def _convolution_macs(args: Sequence[Any], output: Shape) -> int:
    """Output elements times the weights that each of them sums over: (Cin / groups) * kernel."""
    return math.prod(output) * int(math.prod(args[1][1:]))


def _transposed_convolution_macs(args: Sequence[Any], output: Shape) -> int:
    """Input elements times the weights that each of them is spread by: (Cout / groups) * kernel."""
    return int(math.prod(args[0]) * math.prod(args[1][1:]))


def _product_macs(left: int) -> MacFormula:
    """Output elements times the contracted length, the last axis of the operand at `left`."""
    return lambda args, output: math.prod(output) * int(args[left][-1])


def _inner_macs(args: Sequence[Any], output: Shape) -> int:
    """Output elements times the length of the last axes; a number times a tensor has none."""
    return math.prod(output) * (int(args[0][-1]) if args[0] and args[1] else 1)


def _einsum_macs(args: Sequence[Any], output: Shape) -> int:
    """Product of the sizes of all distinct indices."""
    sizes: dict[str, int] = {}
    inputs = str(args[0]).replace(" ", "").split("->")[0].split(",")
    for term, shape in zip(inputs, (args[1], args[2]), strict=True):
        for index, size in _label_axes(term, shape):
            sizes[index] = max(size, sizes.get(index, 1))
    return math.prod(sizes.values())


def _label_axes(term: str, shape: Shape) -> list[tuple[str, int]]:
    """Einsum indices with their sizes; the axes of an ellipsis are labelled from the right, as they broadcast."""
    before, ellipsis, after = term.partition("...")
    if not ellipsis:
        return list(zip(term, shape, strict=True))
    hidden = shape[len(before) : len(shape) - len(after)]
    labels = [f"...{len(hidden) - axis}" for axis in range(len(hidden))]
    return list(zip([*before, *labels, *after], shape, strict=True))


def _tensordot_macs(args: Sequence[Any], output: Shape) -> int:
    """Output elements times the sizes of the contracted axes: the last ones of the first operand, or those named."""
    left, axes = args[0], args[2] if len(args) > 2 else 2
    contracted = left[len(left) - axes :] if isinstance(axes, int) else [left[axis] for axis in axes[0]]
    return math.prod(output) * int(math.prod(contracted))


def _attention_macs(args: Sequence[Any], output: Shape) -> int:
    """Both products: every query meets every key over the query's width and every value over the value's."""
    query, key, value = args[:3]
    return int(math.prod(query[:-1])) * int(key[-2]) * (int(query[-1]) + int(value[-1]))


def _convolution(dimensions: int) -> Operator:
    function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[dimensions]
    aten = getattr(torch.ops.aten, f"conv{dimensions}d")
    return Operator(
        name=f"conv{dimensions}d",
        function=function,
        parameters=("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        activation=0,
        weight=1,
        macs=_convolution_macs,
        aliases=(aten.default, aten.padding),
    )


def _transposed_convolution(dimensions: int) -> Operator:
    functions = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}
    aten = getattr(torch.ops.aten, f"conv_transpose{dimensions}d")
    return Operator(
        name=f"conv_transpose{dimensions}d",
        function=functions[dimensions],
        parameters=("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
        activation=0,
        weight=1,
        macs=_transposed_convolution_macs,
        channel_axis=1,
        aliases=(getattr(aten, "default" if dimensions == 1 else "input"),),
    )


OPERATORS: tuple[Operator, ...] = (
    *(_convolution(dimensions) for dimensions in (1, 2, 3)),
    *(_transposed_convolution(dimensions) for dimensions in (1, 2, 3)),
    Operator(
        "linear",
        F.linear,
        ("input", "weight", "bias"),
        activation=0,
        weight=1,
        macs=_product_macs(0),
        aliases=(torch.ops.aten.linear.default,),
    ),
    Operator(
        "matmul",
        torch.matmul,
        ("input", "other"),
        activation=0,
        weight=1,
        macs=_product_macs(0),
        channel_axis=-1,
        aliases=(operator.matmul, torch.Tensor.matmul, torch.ops.aten.matmul.default, torch.linalg.matmul),
        methods=("matmul", "__matmul__"),
    ),
    Operator(
        "mm",
        torch.mm,
        ("input", "mat2"),
        activation=0,
        weight=1,
        macs=_product_macs(0),
        channel_axis=-1,
        aliases=(torch.ops.aten.mm.default,),
        methods=("mm",),
    ),
    Operator(
        "bmm",
        torch.bmm,
        ("input", "mat2"),
        activation=0,
        weight=1,
        macs=_product_macs(0),
        channel_axis=-1,
        aliases=(torch.ops.aten.bmm.default,),
        methods=("bmm",),
    ),
    Operator(
        "addmm",
        torch.addmm,
        ("input", "mat1", "mat2"),
        activation=1,
        weight=2,
        macs=_product_macs(1),
        channel_axis=-1,
        aliases=(torch.ops.aten.addmm.default,),
        methods=("addmm",),
    ),
    Operator(
        "baddbmm",
        torch.baddbmm,
        ("input", "batch1", "batch2"),
        activation=1,
        weight=2,
        macs=_product_macs(1),
        channel_axis=-1,
        aliases=(torch.ops.aten.baddbmm.default,),
        methods=("baddbmm",),
    ),
    Operator(
        "einsum",
        torch.einsum,
        ("equation", "input", "other"),
        activation=1,
        weight=2,
        macs=_einsum_macs,
        channel_axis=None,
    ),
    Operator(
        "tensordot",
        torch.tensordot,
        ("a", "b", "dims"),
        activation=0,
        weight=1,
        macs=_tensordot_macs,
        channel_axis=None,
    ),
    Operator(
        "inner",
        torch.inner,
        ("input", "other"),
        activation=0,
        weight=1,
        macs=_inner_macs,
        aliases=(torch.ops.aten.inner.default,),
        methods=("inner",),
    ),
    Operator(
        "scaled_dot_product_attention",
        F.scaled_dot_product_attention,
        ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
        activation=0,
        weight=1,
        macs=_attention_macs,
        channel_axis=None,
        aliases=(torch.ops.aten.scaled_dot_product_attention.default,),
    ),
    Operator(
        "embedding",
        F.embedding,
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        activation=0,
        weight=1,
        macs=lambda args, output: 0,
        channel_axis=1,
    ),
)


def _index() -> tuple[dict[Any, Operator], dict[str, Operator]]:
    functions: dict[Any, Operator] = {}
    methods: dict[str, Operator] = {}
    for entry in OPERATORS:
        packets = {each.overloadpacket for each in entry.aliases if isinstance(each, OpOverload)}
        for function in (entry.function, *entry.aliases, *packets):
            if function in functions:
                raise PassError(f"operator table: {function} is claimed by {functions[function].name} and {entry.name}")
            functions[function] = entry
        methods.update(dict.fromkeys(entry.methods, entry))
    return functions, methods


_BY_FUNCTION, _BY_METHOD = _index()
_BY_NAME = {entry.name: entry for entry in OPERATORS}


def operator_named(name: str) -> Operator:
    """The table's entry of that name."""
    return _BY_NAME[name]


def operator_of(node: fx.Node) -> Operator | None:
    """The entry that a node's function or method belongs to, None for anything else."""
    if node.op == "call_function":
        return _BY_FUNCTION.get(node.target)
    if node.op == "call_method":
        return _BY_METHOD.get(str(node.target))
    return None


def operands_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node multiplies, if it calls an operation of the table."""
    entry = operator_of(node)
    if entry is None:
        return []
    operands = (node.args[i] for i in (entry.activation, entry.weight) if i < len(node.args))
    return [each for each in operands if isinstance(each, fx.Node)]


def arithmetic_called(function: Callable[..., Any]) -> str | None:
    """The name of what a function or a method of tensors does, if that has multiply-adds; a look-up has none."""
    entry = operator_called(function)
    if entry is not None:
        return None if entry.name == "embedding" else entry.name
    return getattr(function, "__name__", "") if function_name(function) in _UNCOUNTED else None


def operator_called(function: Callable[..., Any]) -> Operator | None:
    """The entry of a function or a method of tensors, None for anything else."""
    entry = _BY_FUNCTION.get(function)
    if entry is None and (name := getattr(function, "__name__", "")) in _BY_METHOD:
        entry = _BY_METHOD[name] if getattr(torch.Tensor, name) is function else None
    return entry


def quantizable_names() -> frozenset[str]:
    """The names under which Python code calls the table's operations."""
    names = {entry.name for entry in OPERATORS} | set(_BY_METHOD)
    return frozenset(names | {"multi_head_attention_forward"})


_UNCOUNTED = {
    "addbmm", "addmv", "addr", "bilinear", "cdist", "chain_matmul", "cholesky", "cholesky_inverse",
    "cholesky_solve", "conv_tbc", "convolution", "_convolution", "deform_conv2d", "det", "dot", "eig", "eigh",
    "eigvals", "eigvalsh", "fft", "fft2", "fftn", "ger", "gru", "gru_cell", "hfft", "hspmm", "ifft", "ifft2",
    "ifftn", "ihfft", "inv", "inv_ex", "inverse", "irfft", "irfft2", "irfftn", "istft", "kron",
    "logdet", "lstm", "lstm_cell", "lstsq", "matrix_exp", "matrix_power", "multi_dot",
    "multi_head_attention_forward", "mv", "outer", "pinv", "pinverse", "qr", "rfft", "rfft2", "rfftn",
    "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell", "sampled_addmm", "slogdet", "smm", "solve",
    "solve_ex", "solve_triangular", "stft", "svd", "svdvals", "vdot", "vecdot",
}  # fmt: skip


_KNOWN_LIBRARIES = ("aten", "prims", "torchvision")


def _library_of(operation: OpOverload | OpOverloadPacket) -> str:
    packet = operation.overloadpacket if isinstance(operation, OpOverload) else operation
    return str(packet._qualified_op_name).partition("::")[0]


def uncounted_reason(node: fx.Node) -> str | None:
    """Why an operation with multiply-add arithmetic has no entry, for the report; None for all other nodes."""
    if node.target is apply_function:
        return "an autograd function of the model's own, whose operations are not seen"
    if isinstance(node.target, OpOverload | OpOverloadPacket) and _library_of(node.target) not in _KNOWN_LIBRARIES:
        return "an operation of another library, whose arithmetic is not seen"
    name = operation_name(node)
    # Of the table's names those that are no entry: `addmm_`, `sparse.mm`.
    known = name in _UNCOUNTED or (name in _BY_NAME and name != "embedding" and operator_of(node) is None)
    return "no MAC formula for this operation; it stays in float" if known else None
