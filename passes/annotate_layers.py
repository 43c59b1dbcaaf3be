"""Finds the quantizable nodes and writes down what later passes need to know of each."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from saq_fx.annotation import (
    LayerAnnotation,
    annotate,
    is_training_only,
    join_path,
    layer_nodes,
    owner_classes,
    owner_path,
    record_of,
    update_record,
)
from saq_fx.dataflow import depends_on_inputs, is_raw_input, reachable, tensor_at
from saq_fx.fitting import Observed, Observer
from saq_fx.graph import SaqGraphModule, graphs, held_by, parts_of
from saq_fx.inputs import ExampleInputs
from saq_fx.operators import Operator, operator_of
from saq_fx.pass_base import Pass, PassResult
from saq_fx.products import CALLER
from saq_fx.shapes import Measured, NodeShapes, arguments_in, macs_of, measure
from saq_fx.signs import has_nonnegative_values
from saq_fx.uncounted import may_multiply, problem_of, uncounted_in


@dataclass(frozen=True)
class AnnotateLayers(Pass):
    """Annotates each multiplication of two tensors: name, operands, shapes, MACs, sharing, place and signedness.

    An operand that does not depend on the model's inputs is a weight; two operands that do make a product. A layer is
    named by the module that owns its weight (`layer1.0.conv1`), a further call of it `layer1.0.conv1@1`, a product by
    the module that computes it (`blocks.0.attn.matmul`). First layers are those that no other layer feeds, last
    layers those that feed no other, on the data-flow graph.

    Args:
        example_inputs: run once in evaluation mode for shapes and MACs (of one sample); None leaves them unknown.
        embeddings: whether look-ups in tables that are weights are layers as well. They have no MACs, and nothing but
            the weight can be quantized; as to what is first and last, they are none.
        observed: where samples of the layers' operands in that run are put, for `FitLevels`.
    """

    example_inputs: ExampleInputs | None = None
    embeddings: bool = False
    observed: Observed | None = None
    gives: ClassVar[frozenset[str]] = frozenset({"annotations"})

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Annotates `gm` in place."""
        before = _state(gm)
        calls = [call for path, part in graphs(gm) for call in _find_calls(part, path, self.embeddings)]
        observers = {} if self.observed is None else {call.node: call.observers() for call in calls}
        nodes, measured = {call.node for call in calls}, Measured()

        def watch(part: SaqGraphModule, node: fx.Node) -> bool:
            return node not in nodes and may_multiply(part, node)

        if self.example_inputs is not None:
            measured = measure(gm, self.example_inputs, watch, observers)
        calls = [call for call in calls if measured.unfit.keys().isdisjoint(call.operands)]
        _name(calls)
        _rename_clashing(calls)
        if self.observed is not None:
            self.observed.update({call.name: observers[call.node] for call in calls})
        groups = _choice_groups(calls)
        _describe(gm, calls, groups, None if self.example_inputs is None else measured.shapes)
        uncounted = [each for path, part in graphs(gm) for each in uncounted_in(part, path, measured)]
        update_record(
            gm,
            annotated=True,
            uncounted=tuple((each.name, each.reason) for each in uncounted),
            uncounted_macs=sum(each.macs for each in uncounted),
        )
        return PassResult(gm, before != _state(gm))


def _state(gm: SaqGraphModule) -> list[Any]:
    """All that annotating changes."""
    return [(record_of(part), list(layer_nodes(part.graph))) for _, part in graphs(gm)]


@dataclass
class _Call:
    """One quantizable node of the graph at `path`.

    `weight_source` is the parameter or buffer that its weight comes from, None for a product; `weight_tensor` is that.
    """

    graph_module: SaqGraphModule
    path: str
    node: fx.Node
    operator: Operator
    activation_operand: int
    weight_operand: int
    weight_source: str | None
    weight_tensor: Tensor | None
    name: str = ""

    @property
    def is_lookup(self) -> bool:
        """Whether the first operand are indices into the second."""
        return self.operator.name == "embedding"

    @property
    def activation(self) -> fx.Node:
        node: fx.Node = self.node.args[self.activation_operand]  # type: ignore[assignment]
        return node

    @property
    def weight(self) -> fx.Node:
        node: fx.Node = self.node.args[self.weight_operand]  # type: ignore[assignment]
        return node

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """What may be quantized."""
        return (self.weight,) if self.is_lookup else (self.activation, self.weight)

    def observers(self) -> dict[int, Observer]:
        """New observers of its operands, by position."""
        weight = {self.weight_operand: Observer(is_weight=self.weight_source is not None)}
        return weight if self.is_lookup else {self.activation_operand: Observer(is_weight=False)} | weight


def _find_calls(gm: SaqGraphModule, path: str, embeddings: bool) -> list[_Call]:
    """The layers of one graph, which is the part at `path`, as far as its structure tells."""
    dependent, unmeasured = depends_on_inputs(gm.graph), Measured()
    calls = []
    for node in gm.graph.nodes:
        entry = operator_of(node)
        if entry is None or is_training_only(node) or problem_of(gm, node, unmeasured) is not None:
            continue
        left, right = node.args[entry.activation], node.args[entry.weight]
        if entry.name == "embedding" and (not embeddings or right in dependent):
            continue
        if right in dependent and left in dependent:
            calls.append(_Call(gm, path, node, entry, entry.activation, entry.weight, None, None))
        elif right in dependent:
            calls.append(_Call(gm, path, node, entry, entry.weight, entry.activation, *_source(gm, left)))
        else:
            calls.append(_Call(gm, path, node, entry, entry.activation, entry.weight, *_source(gm, right)))
    return calls


def _source(gm: SaqGraphModule, node: fx.Node) -> tuple[str, Tensor | None]:
    """The first parameter that a weight expression reads, or else buffer; the node's own name where it reads none."""
    pending, seen, found = [node], {node}, []
    while pending:
        current = pending.pop(0)
        if current.op == "get_attr":
            tensor = tensor_at(gm, str(current.target))
            found.append((str(current.target), tensor))
            if isinstance(tensor, nn.Parameter):
                return found[-1]
        fresh = [each for each in current.all_input_nodes if each not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return found[0] if found else (node.name, None)


def _describe(gm: SaqGraphModule, calls: list[_Call], groups: dict[str, str], shapes: NodeShapes | None) -> None:
    """Annotates the calls of a graph and of its parts."""
    own = [call for call in calls if call.graph_module is gm]
    nonnegative = has_nonnegative_values(gm)
    raw = is_raw_input(gm) if record_of(gm).reads_network_input else set()
    positions = _positions(gm, [call.node for call in own if not call.is_lookup], raw)
    for call in own:
        position = positions.get(call.node)
        annotation = LayerAnnotation(
            name=call.name,
            op=call.operator.name,
            activation_operand=call.activation_operand,
            weight_operand=call.weight_operand,
            weight=call.weight_source,
            choice_group=groups[call.name],
            module_classes=owner_classes(call.node),
            position=position,
            # Neither an image's values nor indices are quantized.
            reads_network_input=call.is_lookup or (position in ("first", "only") and call.activation in raw),
            activation_signed=call.activation not in nonnegative,
            weight_signed=call.weight_source is not None or call.weight not in nonnegative,
            **({} if shapes is None else _measured(call, shapes)),
        )
        annotate(call.node, annotation)
    for part in parts_of(gm).values():
        _describe(part, calls, groups, shapes)


def _rename_clashing(calls: list[_Call]) -> None:
    """Names operations of Python code by their graphs where another layer has the name of their weight, or theirs."""
    counts = Counter(call.name for call in calls)
    clashing = [call for call in calls if record_of(call.graph_module).is_operation and counts[call.name] > 1]
    taken = {call.name for call in calls if call not in clashing}
    for call in clashing:
        names = (call.path, join_path(call.path, call.node.name))
        call.name = next((each for each in names if each not in taken), names[-1])
        taken.add(call.name)


def _name(calls: list[_Call]) -> None:
    """One name a call: `base` for a weight's first use, `base@k` for further ones, `base_k` for other operands."""
    operands_of: dict[tuple[str, str], list[fx.Node]] = defaultdict(list)
    uses: dict[tuple[str, str], int] = defaultdict(int)
    for call in calls:
        base = _base_name(call)
        operand, known = call.node if call.weight_source is None else call.weight, operands_of[call.path, base]
        if operand not in known:
            known.append(operand)
        index = known.index(operand)
        name = f"{base}_{index}" if index else base
        use = uses[call.path, name]
        call.name = f"{name}@{use}" if use else name
        uses[call.path, name] += 1


def _base_name(call: _Call) -> str:
    owner = join_path(call.path, owner_path(call.node))
    is_operation, source = record_of(call.graph_module).is_operation, call.weight_source
    if call.is_lookup:
        return owner or call.operator.name
    if source is None or call.weight_tensor is None:
        return call.path if is_operation else join_path(owner, call.operator.name)
    if is_operation:
        weight = join_path(call.path.rpartition(".")[0], source.removeprefix(f"{CALLER}."))
    else:
        weight = join_path(call.path, source)
    holder, _, field = weight.partition(".parametrizations.")[0].rpartition(".")
    if field.startswith(("weight", "_tensor_constant")):
        return holder or call.operator.name
    return f"{holder}.{field}".removeprefix(".").removesuffix("_weight")


def _choice_groups(calls: list[_Call]) -> dict[str, str]:
    """Layer name -> name of the first layer of those that share its weight, and so share one choice of bits."""
    leaders: dict[int, str] = {}
    look_ups_last = sorted(calls, key=lambda call: call.is_lookup)
    return {call.name: leaders.setdefault(id(_what_is_shared(call)), call.name) for call in look_ups_last}


def _what_is_shared(call: _Call) -> Any:
    """The weight's tensor, the node that computes a weight, or a product itself."""
    if call.weight_source is None:
        return call.node
    return call.weight_tensor if call.weight.op == "get_attr" and call.weight_tensor is not None else call.weight


def _positions(gm: SaqGraphModule, nodes: list[fx.Node], raw: set[fx.Node]) -> dict[fx.Node, str | None]:
    """First: fed by the inputs and by no other layer. Last: feeding the output and no other layer. Only: both.

    A node that holds parts counts as a layer, whose place its parts inherit.
    """
    parts = parts_of(gm)
    holders = {node: held for node in gm.graph.nodes if (held := held_by(node, parts))} if parts else {}
    starts = [*nodes, *holders]
    downstream = reachable(gm.graph, starts, forwards=True)
    upstream = reachable(gm.graph, starts, forwards=False)
    dependent = depends_on_inputs(gm.graph)
    record = record_of(gm)
    positions: dict[fx.Node, str | None] = {}
    for node in starts:
        first = record.is_first and node not in downstream and node in dependent
        last = record.is_last and node not in upstream
        positions[node] = "only" if first and last else "first" if first else "last" if last else None
        for part in (parts[path] for path in holders.get(node, ())):
            inner = record_of(part)
            update_record(
                part,
                is_first=inner.is_first and first,
                is_last=inner.is_last and last,
                reads_network_input=inner.reads_network_input and any(each in raw for each in node.all_input_nodes),
            )
    return positions


def _measured(call: _Call, shapes: NodeShapes) -> dict[str, Any]:
    """Shapes of the first run of a layer, and the MACs of all its runs, as fields of its annotation."""
    outputs = shapes.get(call.node, ())
    arguments = arguments_in(call.node, shapes)
    unreached = (0,) if call.weight_tensor is None else tuple(call.weight_tensor.shape)
    return {
        "macs": macs_of(call.node, shapes),
        "activation_shape": arguments[0][call.activation_operand] if outputs and not call.is_lookup else (0,),
        "weight_shape": arguments[0][call.weight_operand] if outputs else unreached,
        "output_shape": outputs[0] if outputs else (0,),
    }
