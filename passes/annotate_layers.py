"""Finds the quantizable nodes and writes down what later passes need to know of each."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import networkx as nx
from torch import fx, nn

from saq_fx.annotation import (
    LayerAnnotation,
    annotate,
    annotation_of,
    is_training_only,
    owner_classes,
    owner_path,
    record_of,
    update,
    update_record,
)
from saq_fx.dataflow import depends_on_inputs, has_nonnegative_values, is_raw_input, reachable, tensor_at
from saq_fx.graph import SaqGraphModule
from saq_fx.operators import UNCOUNTED_FUNCTIONS, Operator, operator_of
from saq_fx.pass_base import Pass, PassResult
from saq_fx.shapes import output_shapes
from saq_fx.tracing import ExampleInputs

_NOT_COUNTED = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


@dataclass(frozen=True)
class AnnotateLayers(Pass):
    """Annotates each multiplication of two tensors: name, operands, shapes, MACs, sharing, place and signedness.

    An operand that does not depend on the model's inputs is a weight; two operands that do make a product. A layer is
    named by the module that owns its weight (`layer1.0.conv1`), a further call of it `layer1.0.conv1@1`, a product by
    the module that computes it (`blocks.0.attn.matmul`). First layers are those that no other layer feeds, last
    layers those that feed no other, on the data-flow graph.

    Args:
        example_inputs: run once in evaluation mode for shapes and MACs (of one sample); None leaves them unknown.
    """

    example_inputs: ExampleInputs | None = None
    gives: ClassVar[frozenset[str]] = frozenset({"annotations"})

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Annotates `gm` in place."""
        before = ([annotation_of(node) for node in gm.graph.nodes], record_of(gm))
        calls = _find_calls(gm)
        for call, annotation in zip(calls, _describe(gm, calls), strict=True):
            annotate(call.node, annotation)
        if self.example_inputs is not None:
            _measure(gm, calls, self.example_inputs)
        update_record(gm, annotated=True, uncounted=tuple(_uncounted(gm)))
        return PassResult(gm, before != ([annotation_of(node) for node in gm.graph.nodes], record_of(gm)))


@dataclass(frozen=True)
class _Call:
    """One quantizable node; `weight_source` is the parameter or buffer its weight comes from, None for a product."""

    node: fx.Node
    operator: Operator
    activation_operand: int
    weight_operand: int
    weight_source: str | None

    @property
    def activation(self) -> fx.Node:
        node: fx.Node = self.node.args[self.activation_operand]  # type: ignore[assignment]
        return node

    @property
    def weight(self) -> fx.Node:
        node: fx.Node = self.node.args[self.weight_operand]  # type: ignore[assignment]
        return node


def _find_calls(gm: SaqGraphModule) -> list[_Call]:
    dependent = depends_on_inputs(gm.graph)
    calls = []
    for node in gm.graph.nodes:
        entry = operator_of(node)
        if entry is None or is_training_only(node) or _problem(node, entry) is not None:
            continue
        left, right = node.args[entry.activation], node.args[entry.weight]
        if right in dependent and left in dependent:
            calls.append(_Call(node, entry, entry.activation, entry.weight, None))
        elif right in dependent:
            calls.append(_Call(node, entry, entry.weight, entry.activation, _source(left)))
        else:
            calls.append(_Call(node, entry, entry.activation, entry.weight, _source(right)))
    return calls


def _problem(node: fx.Node, entry: Operator) -> str | None:
    """Why a node of the table cannot be quantized and counted, None where it can."""
    operands = [node.args[i] if i < len(node.args) else None for i in (entry.activation, entry.weight)]
    if "out" in node.kwargs or not all(isinstance(operand, fx.Node) for operand in operands):
        return "its operands are not two tensors"
    if entry.name == "einsum" and len(node.args) != 3:
        return "an einsum of more or fewer than two tensors"
    return None


def _source(node: fx.Node) -> str:
    """The first parameter or buffer that a weight expression reads; the node's own name where it reads none."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        if current.op == "get_attr":
            return str(current.target)
        fresh = [each for each in current.all_input_nodes if each not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return node.name


def _describe(gm: SaqGraphModule, calls: list[_Call]) -> list[LayerAnnotation]:
    names = _names(calls)
    groups = _choice_groups(gm, calls, names)
    nonnegative = has_nonnegative_values(gm)
    raw = is_raw_input(gm)
    positions = _positions(gm, calls)
    return [
        LayerAnnotation(
            name=name,
            op=call.operator.name,
            activation_operand=call.activation_operand,
            weight_operand=call.weight_operand,
            weight=call.weight_source,
            choice_group=groups[name],
            module_classes=owner_classes(call.node),
            position=positions[call.node],
            reads_network_input=positions[call.node] in ("first", "only") and call.activation in raw,
            activation_signed=call.activation not in nonnegative,
            weight_signed=call.weight_source is not None or call.weight not in nonnegative,
        )
        for call, name in zip(calls, names, strict=True)
    ]


def _names(calls: list[_Call]) -> list[str]:
    """One name a call: `base` for a weight's first use, `base@k` for further ones, `base_k` for other operands."""
    operands_of: dict[str, list[Any]] = defaultdict(list)
    uses: dict[str, int] = defaultdict(int)
    names = []
    for call in calls:
        base = _base_name(call)
        operand = call.node if call.weight_source is None else call.weight
        if operand not in operands_of[base]:
            operands_of[base].append(operand)
        index = operands_of[base].index(operand)
        name = f"{base}_{index}" if index else base
        names.append(f"{name}@{uses[name]}" if uses[name] else name)
        uses[name] += 1
    return names


def _base_name(call: _Call) -> str:
    owner = owner_path(call.node)
    if call.weight_source is None:
        return f"{owner}.{call.operator.name}" if owner else call.operator.name
    path, _, field = call.weight_source.partition(".parametrizations.")[0].rpartition(".")
    if field.startswith(("weight", "_tensor_constant")):
        return path or call.operator.name
    return f"{path}.{field}".removeprefix(".").removesuffix("_weight")


def _choice_groups(gm: SaqGraphModule, calls: list[_Call], names: list[str]) -> dict[str, str]:
    """Layer name -> name of the first layer of those that share its weight, and so share one choice of bits."""
    sharing: nx.Graph[str] = nx.Graph()
    sharing.add_nodes_from(names)
    first_user: dict[int, str] = {}
    for call, name in zip(calls, names, strict=True):
        if call.weight_source is not None:
            tensor = tensor_at(gm, call.weight_source)
            key = id(tensor) if call.weight.op == "get_attr" and tensor is not None else id(call.weight)
            sharing.add_edge(first_user.setdefault(key, name), name)
    order = {name: index for index, name in enumerate(names)}
    groups = {}
    for component in nx.connected_components(sharing):
        leader = min(component, key=order.__getitem__)
        groups.update(dict.fromkeys(component, leader))
    return groups


def _positions(gm: SaqGraphModule, calls: list[_Call]) -> dict[fx.Node, str | None]:
    """First: fed by the inputs and by no other layer. Last: feeding the output and no other layer. Only: both."""
    layer_nodes = [call.node for call in calls]
    downstream = reachable(gm.graph, layer_nodes, forwards=True)
    upstream = reachable(gm.graph, layer_nodes, forwards=False)
    dependent = depends_on_inputs(gm.graph)
    positions: dict[fx.Node, str | None] = {}
    for node in layer_nodes:
        first, last = node not in downstream and node in dependent, node not in upstream
        positions[node] = "only" if first and last else "first" if first else "last" if last else None
    return positions


def _measure(gm: SaqGraphModule, calls: list[_Call], example_inputs: ExampleInputs) -> None:
    shapes = output_shapes(gm, example_inputs)
    for call in calls:
        args = [shapes[arg] if isinstance(arg, fx.Node) and arg in shapes else arg for arg in call.node.args]
        update(
            call.node,
            macs=call.operator.macs(args, shapes[call.node]),
            activation_shape=args[call.activation_operand],
            weight_shape=args[call.weight_operand],
            output_shape=shapes[call.node],
        )


def _uncounted(gm: SaqGraphModule) -> Iterable[tuple[str, str]]:
    """Operations with arithmetic that are no layers, as (name, reason)."""
    for node in gm.graph.nodes:
        if annotation_of(node) is not None:
            continue
        name, entry = str(node.target) if node.op == "call_module" else node.name, operator_of(node)
        if entry is not None:
            owner = owner_path(node)
            where = f"{owner}.{node.name}" if owner else node.name
            yield where, "runs in training only" if is_training_only(node) else str(_problem(node, entry))
        elif node.op == "call_function" and node.target in UNCOUNTED_FUNCTIONS:
            yield name, UNCOUNTED_FUNCTIONS[node.target]
        elif node.op == "call_module":
            module = gm.get_submodule(name)
            if not isinstance(module, _NOT_COUNTED) and any(p.dim() > 1 for p in module.parameters()):
                yield name, f"{type(module).__name__} is not in the operator table; it stays in float"
