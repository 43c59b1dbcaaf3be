"""The one place that touches `node.meta`: what the compiler knows of each quantizable node, and of the graph.

Annotations are frozen and hold no `Node`, so that they survive copies of the graph. A pass changes one by
`update(node, precision=...)`, which replaces it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from saq_fx.precision import FLOAT_BITS, Precision
from saq_fx.recipe import Recipe

_KEY = "saq_fx"

NETWORK_INPUT_BITS = 8
_TRAINING_ONLY = "saq_fx_training_only"
_OWNER = "nn_module_stack"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerAnnotation:
    """What is known of one quantizable node (one call of one layer).

    `activation_operand` and `weight_operand` are positions in the node's arguments. In a product of two activations
    (`weight is None`) the weight operand is the second activation. `macs` counts multiply-adds for one sample;
    shapes are those of one sample batch, None where the model was prepared without example inputs.
    """

    name: str
    op: str
    activation_operand: int
    weight_operand: int
    weight: str | None
    choice_group: str
    module_classes: tuple[str, ...] = ()
    macs: int | None = None
    activation_shape: Shape | None = None
    weight_shape: Shape | None = None
    output_shape: Shape | None = None
    position: str | None = None
    reads_network_input: bool = False
    activation_signed: bool = True
    weight_signed: bool = True
    pinned: Precision | None = None
    precision: Precision | None = None
    input_quantizer: str | None = None
    weight_quantizer: str | None = None

    @property
    def is_product(self) -> bool:
        """Whether both operands are activations, as in attention."""
        return self.weight is None

    def under(self, path: str) -> "LayerAnnotation":
        """The same layer, its modules and weight named from outside, where its graph is a part at `path`."""

        def outside(inner: str | None) -> str | None:
            return None if inner is None else join_path(path, inner)

        return replace(
            self,
            weight=outside(self.weight),
            input_quantizer=outside(self.input_quantizer),
            weight_quantizer=outside(self.weight_quantizer),
        )


def join_path(outer: str, inner: str) -> str:
    """The path of `inner`, which is relative to the module at `outer`; either may be ''."""
    return f"{outer}.{inner}" if outer and inner else outer or inner


def effective_precision(wanted: Precision, *, is_product: bool, reads_network_input: bool) -> Precision:
    """The precision that a layer has when it is asked for `wanted`, in bits.

    Both operands of a product of activations have the activation width. The network's input is not quantized: it came
    with 8 bits, and counts so unless the other operand is float (SAQ, Sec. 5).
    """
    weight = wanted.activation if is_product else wanted.weight
    activation = wanted.activation
    if reads_network_input:
        activation = FLOAT_BITS if weight == FLOAT_BITS else NETWORK_INPUT_BITS
    return Precision(activation if is_product else weight, activation)


@dataclass(frozen=True)
class GraphRecord:
    """What is known of a graph as a whole.

    `tracing` is the way taken from model to graph; `uncounted` lists operations with arithmetic whose MACs are not in
    the report's totals, as (name, reason), and `uncounted_macs` is their sum as far as it is known; `recipe` is what
    the quantizers were made by, None before they were.

    Of a model captured by parts, `parts` are the paths of the outermost graphs inside this one, and `untraced` the
    operations of the table that run in Python around them, as (name, reason). Of a part, the next three fields say how
    it stands in the data flow around it: no other part feeds it, it feeds no other part, and it reads the network's
    input as it is.
    """

    tracing: str = "given graph"
    parts: tuple[str, ...] = ()
    untraced: tuple[tuple[str, str], ...] = ()
    is_first: bool = True
    is_last: bool = True
    reads_network_input: bool = True
    uncounted: tuple[tuple[str, str], ...] = ()
    uncounted_macs: int = 0
    annotated: bool = False
    recipe: Recipe | None = None
    perturbation_case: int | None = None
    is_operation: bool = False


def annotation_of(node: fx.Node) -> LayerAnnotation | None:
    """The annotation of a quantizable node, None for any other node."""
    return node.meta.get(_KEY)


def annotate(node: fx.Node, annotation: LayerAnnotation | None) -> None:
    """Sets, replaces or (None) removes the annotation of a node."""
    if annotation is None:
        node.meta.pop(_KEY, None)
    else:
        node.meta[_KEY] = annotation


def update(node: fx.Node, **changes: Any) -> LayerAnnotation:
    """Replaces fields of a node's annotation and returns the new one."""
    annotation = object.__new__(LayerAnnotation)  # as `replace`, in a fifth of the time
    vars(annotation).update(vars(node.meta[_KEY]), **changes)
    node.meta[_KEY] = annotation
    return annotation


def layer_nodes(graph: fx.Graph) -> Iterator[tuple[fx.Node, LayerAnnotation]]:
    """The annotated nodes of one graph, in the order of execution."""
    for node in graph.nodes:
        annotation = node.meta.get(_KEY)
        if annotation is not None:
            yield node, annotation


def record_of(gm: fx.GraphModule) -> GraphRecord:
    """The record of the graph as a whole; an empty one where no pass has written any."""
    record: GraphRecord = gm.meta.get(_KEY, GraphRecord())
    return record


def update_record(gm: fx.GraphModule, **changes: Any) -> GraphRecord:
    """Replaces fields of the graph's record and returns the new one."""
    record = replace(record_of(gm), **changes)
    gm.meta[_KEY] = record
    return record


def copy_record(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Gives a graph the record of the one it was made from."""
    target.meta[_KEY] = record_of(source)


def owner_path(node: fx.Node) -> str:
    """Path of the innermost module whose forward made this node; '' at the root or where tracing left no trace."""
    stack = node.meta.get(_OWNER)
    if not stack:
        return ""
    innermost = list(stack.values())[-1]
    return str(innermost[0])


def inherit_owner(new: Iterable[fx.Node], old: fx.Node, module: tuple[str, type] | None = None) -> None:
    """Gives nodes that replace `old` its owner and mode; `module` = (path, class) adds a leaf that was opened."""
    stack = dict(old.meta.get(_OWNER) or {})
    if module is not None:
        stack[module[0]] = module
    for node in new:
        node.meta[_OWNER] = stack
        if is_training_only(old):
            mark_training_only(node)


def mark_training_only(node: fx.Node) -> None:
    """Notes that only the training mode uses this node's result."""
    node.meta[_TRAINING_ONLY] = True


def is_training_only(node: fx.Node) -> bool:
    """Whether only the training mode uses this node's result."""
    return bool(node.meta.get(_TRAINING_ONLY, False))


def owner_classes(node: fx.Node) -> tuple[str, ...]:
    """Class names of the modules around a node, outermost first."""
    stack = node.meta.get(_OWNER) or {}
    return tuple(cls.__name__ if isinstance(cls, type) else str(cls).rsplit(".", 1)[-1] for _, cls in stack.values())


def dump_meta(nodes: Iterable[fx.Node]) -> list[dict[str, Any]]:
    """What pickling keeps of each node's meta: its annotation, mode and owner, with classes by name."""
    dumped = []
    for node in nodes:
        kept = {key: node.meta[key] for key in (_KEY, _TRAINING_ONLY) if key in node.meta}
        classes = zip((path for path, _ in (node.meta.get(_OWNER) or {}).values()), owner_classes(node), strict=True)
        dumped.append({**kept, _OWNER: {path: (path, name) for path, name in classes}})
    return dumped


def restore_meta(nodes: Iterable[fx.Node], metas: Iterable[dict[str, Any]]) -> None:
    """The inverse of `dump_meta`, on nodes in the same order."""
    for node, meta in zip(nodes, metas, strict=True):
        node.meta.update(meta)
