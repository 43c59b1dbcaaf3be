"""Operations with arithmetic that are no layers: why not, and how many MACs they have."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx, nn

from saq_fx.annotation import annotation_of, is_training_only, join_path, owner_path, record_of
from saq_fx.dataflow import is_constant, reads_shape_only, tensor_at
from saq_fx.graph import SaqGraphModule, called_module, held_by, parts_of
from saq_fx.inputs import is_plain
from saq_fx.mutation import MAKES_NEW, VIEWS
from saq_fx.operation_names import operation_name
from saq_fx.operators import operator_of, uncounted_reason
from saq_fx.shapes import Measured, macs_of, unfit_type

_NORMALIZES_OR_LOOKS_UP = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


class Uncounted(NamedTuple):
    """An operation that the totals leave out; its MACs are 0 where they are not known."""

    name: str
    reason: str
    macs: int


def problem_of(gm: nn.Module, node: fx.Node, measured: Measured) -> str | None:
    """Why a node that calls an operation of the table cannot be quantized, None where it can (or calls none)."""
    entry = operator_of(node)
    if entry is None:
        return None
    operands: list[Any] = [node.args[i] if i < len(node.args) else None for i in (entry.activation, entry.weight)]
    if "out" in node.kwargs or not all(isinstance(operand, fx.Node) for operand in operands):
        return "its operands are not two tensors"
    if entry.name == "einsum" and len(node.args) != 3:
        return "an einsum of more or fewer than two tensors"
    if entry.name == "tensordot" and not is_plain(node.args[2:]):
        return "the axes of a tensordot that are computed, or in tensors"
    is_lookup, has_parameter = entry.name == "embedding", False
    for operand in operands[is_lookup:]:
        tensor = tensor_at(gm, str(operand.target)) if operand.op == "get_attr" else None
        has_parameter |= isinstance(tensor, nn.Parameter)
        unfit = measured.unfit.get(operand) or (None if tensor is None else unfit_type(tensor))
        if unfit is not None:
            return f"{unfit} operands are not quantized"
    if not (is_lookup or has_parameter) and is_constant(gm, node):
        return "its operands are constants, as of a table of positions; it stays in float"
    return None


def may_multiply(gm: SaqGraphModule, node: fx.Node) -> bool:
    """Whether a node is neither a layer nor known to have no multiply-adds."""
    if node.op == "call_module":
        module = called_module(gm, node)
        own = type(module).__module__
        # A parametrization (spectral norm) computes with the weight that it is given.
        is_known = own.startswith(("torch.nn", "saq_fx")) and not (
            own.startswith("torch.nn.utils") or has_weights(module)
        )
        return not (is_known or isinstance(module, SaqGraphModule))
    if node.op not in ("call_function", "call_method"):
        return False
    if operator_of(node) is not None:
        return problem_of(gm, node, Measured()) is not None
    name = operation_name(node)
    return not (name in MAKES_NEW or name in VIEWS or reads_shape_only(node))


def uncounted_in(gm: SaqGraphModule, path: str, measured: Measured) -> Iterator[Uncounted]:
    """What is no layer in a graph, which is the part at `path`."""
    parts, untraced = parts_of(gm), list(record_of(gm).untraced)
    in_python = 0
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            continue
        if held := held_by(node, parts):
            if node in measured.macs:
                in_python += measured.macs[node] - sum(_macs_of_graph(parts[each], measured) for each in held)
        elif annotation_of(node) is None and (reason := _reason(gm, node, measured)) is not None:
            yield Uncounted(_name(node, path), reason, _macs(node, measured))
    if in_python > 0 and not untraced:
        untraced.append(("", "multiplications run in Python code that cannot be traced"))
    for name, reason in untraced:
        # Of Python code only the sum is known.
        yield Uncounted(join_path(path, name), reason, max(0, in_python))
        in_python = 0


def _macs_of_graph(part: SaqGraphModule, measured: Measured) -> int:
    """All that runs when a part does, at all its calls."""
    return sum(
        layer.macs or 0 if (layer := annotation_of(node)) is not None else _macs(node, measured)
        for node in part.graph.nodes
    )


def _name(node: fx.Node, path: str) -> str:
    if node.op == "call_module":
        return join_path(path, str(node.target))
    return join_path(join_path(path, owner_path(node)), node.name)


def _reason(gm: SaqGraphModule, node: fx.Node, measured: Measured) -> str | None:
    entry = operator_of(node)
    if entry is not None and entry.name == "embedding":
        return None  # it has no arithmetic
    if entry is not None:
        return "runs in training only" if is_training_only(node) else problem_of(gm, node, measured)
    reason = uncounted_reason(node)
    if reason is not None:
        return reason
    multiplies = measured.macs.get(node, 0) > 0
    if node.op != "call_module":
        return "is not in the operator table; it stays in float" if multiplies else None
    module = called_module(gm, node)
    is_listed = any(name.startswith(f"{node.target}.") for name, _ in record_of(gm).untraced)
    if is_listed or not (multiplies or has_weights(module)):
        return None
    return not_in_table(module)


def not_in_table(module: nn.Module) -> str:
    """Why a module that has weights is not quantized."""
    return f"{type(module).__name__} is not in the operator table; it stays in float"


def _macs(node: fx.Node, measured: Measured) -> int:
    if node in measured.macs or is_training_only(node):
        return measured.macs.get(node, 0)
    return macs_of(node, measured.shapes)


def has_weights(module: nn.Module) -> bool:
    """Whether a leaf has weights that no part of it takes care of."""
    if isinstance(module, (SaqGraphModule, *_NORMALIZES_OR_LOOKS_UP)):
        return False
    own = any(each is not None and each.dim() > 1 for each in module._parameters.values())
    return own or any(each is not None and has_weights(each) for each in module._modules.values())
