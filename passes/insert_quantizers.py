"""Puts a quantizer node on every quantized tensor."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from saq_fx.annotation import LayerAnnotation, join_path, layer_nodes, record_of, update, update_record
from saq_fx.dataflow import tensor_at
from saq_fx.errors import PatternError
from saq_fx.graph import SaqGraphModule, attribute_at, called_module, graphs, layers, unused_name, unused_path
from saq_fx.operation_names import source_of, writes_first
from saq_fx.operators import operator_named
from saq_fx.pass_base import Pass, PassResult
from saq_fx.precision import LayerKey
from saq_fx.quantizers import ClipActivationQuantizer, ClipWeightQuantizer, Quantizer, StepQuantizer
from saq_fx.recipe import Recipe
from saq_fx.rewriting import create_node, set_arg


@dataclass(frozen=True)
class InsertQuantizers(Pass):
    """Wraps both operands of every layer in quantizer nodes.

    `conv2d(x, w)` becomes `conv2d(conv.input_quantizer(x), conv.weight_quantizer(w))`, and a product's second operand
    goes through `other_quantizer`. One weight has one quantizer, however many layers read it. The network's own input
    gets none. Activations that cannot be negative are unsigned, all others signed (LSQ+): docs/method.md.
    """

    recipe: Recipe = field(default_factory=Recipe)
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "precision"})
    gives: ClassVar[frozenset[str]] = frozenset({"quantizers"})

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Rewrites `gm` in place; layers that have their quantizers already stay as they are."""
        annotations = [layer for _, layer in layers(gm)]
        has_attention = any(layer.is_product for layer in annotations)
        factory = _Factory(self.recipe, self.recipe.scheme or ("lsq" if has_attention else "clip"))
        signed = _signed_overrides(annotations, self.recipe)
        modified = record_of(gm).recipe != self.recipe
        for path, part in graphs(gm):
            for node, layer in list(layer_nodes(part.graph)):
                if layer.name in signed:
                    layer = update(node, activation_signed=signed[layer.name])
                # An operation may be named by a weight outside of its graph.
                is_within = layer.name.startswith(path)
                name = layer.name.removeprefix(path).removeprefix(".") if is_within else ""
                weight = None if layer.weight is None else tensor_at(part, layer.weight)
                site = _Site(part, node, layer, name, weight, _placement(gm, part, weight))
                modified |= _insert_both(site, factory)
        update_record(gm, recipe=self.recipe)
        return PassResult(gm, modified)


@dataclass
class _Site:
    """A layer that gets its quantizers: its graph, node and annotation, its name within the graph, its weight's tensor.

    And device and type, as keyword arguments.
    """

    graph_module: SaqGraphModule
    node: fx.Node
    layer: LayerAnnotation
    name: str
    weight: Tensor | None
    placement: dict[str, Any]

    @property
    def bits(self) -> tuple[int, int]:
        """Of weights and of activations."""
        precision = self.layer.precision
        if precision is None:
            raise ValueError(f"layer {self.layer.name} has no precision")
        return precision.weight, precision.activation


class _Factory:
    """Makes quantizers by a recipe, whose scheme may be left to the network, and keeps those of weights."""

    def __init__(self, recipe: Recipe, scheme: str) -> None:
        self.recipe, self.scheme = recipe, scheme
        self.of_weights: dict[tuple[Any, ...], Quantizer] = {}  # by the weight's tensor, in whatever part it is read

    def for_activation(self, site: _Site, signed: bool) -> Quantizer:
        """A quantizer of an activation."""
        bits, like = site.bits[1], site.placement
        if signed or self.recipe.activation_offsets:
            return StepQuantizer(bits, signed=signed, offset=True, **like)
        if self.scheme == "lsq":
            return StepQuantizer(bits, signed=False, **like)
        return ClipActivationQuantizer(bits, **like)

    def for_weight(self, site: _Site, normalize: bool, channels: tuple[int, int] | None) -> Quantizer:
        """A quantizer of a weight, with one level for each of the output channels, given as (axis, number)."""
        bits, like = site.bits[0], site.placement
        axis, count = channels if channels is not None else (0, None)
        if self.scheme == "lsq":
            return StepQuantizer(bits, signed=True, channels=count, channel_axis=axis, **like)
        return ClipWeightQuantizer(bits, channels=count, channel_axis=axis, normalize=normalize, **like)


def _placement(gm: SaqGraphModule, part: SaqGraphModule, weight: Tensor | None) -> dict[str, Any]:
    """Device and type of a layer's weight, or of whatever parameter there is, in its part or anywhere."""
    reference = next(part.parameters(), next(gm.parameters(), None)) if weight is None else weight
    if reference is None:
        return {}
    return {"device": reference.device, "dtype": reference.dtype if reference.is_floating_point() else None}


def _insert_both(site: _Site, factory: _Factory) -> bool:
    layer = site.layer
    paths = {}
    if layer.input_quantizer is None and not layer.reads_network_input:
        quantizer = factory.for_activation(site, layer.activation_signed)
        paths["input_quantizer"] = _insert(site, layer.activation_operand, "input_quantizer", quantizer)
    if layer.weight_quantizer is None:
        paths["weight_quantizer"] = _insert_second(site, factory)
    if paths:
        update(site.node, **paths)
    return bool(paths)


def _signed_overrides(annotations: list[LayerAnnotation], recipe: Recipe) -> dict[str, bool]:
    keys = [LayerKey(layer.name, layer.op, layer.module_classes) for layer in annotations if recipe.signed]
    overrides = {}
    for pattern, signed in recipe.signed.items():
        matched = [key.name for key in keys if key.name == pattern or key.matches(pattern)]
        if not matched:
            raise PatternError(f"the recipe's signed pattern {pattern!r} matches no layer; see precision_report(gm)")
        overrides.update(dict.fromkeys(matched, signed))
    return overrides


def _insert_second(site: _Site, factory: _Factory) -> str:
    """Quantizes the weight, or a product's second operand; the quantizer's path."""
    gm, node, layer, recipe = site.graph_module, site.node, site.layer, factory.recipe
    if layer.is_product:
        quantizer = factory.for_activation(site, layer.weight_signed)
        return _insert(site, layer.weight_operand, "other_quantizer", quantizer)
    weight: fx.Node = node.args[layer.weight_operand]  # type: ignore[assignment]
    shared = next((user for user in reversed(weight.users) if _is_weight_quantizer(gm, user)), None)
    if shared is not None and not _is_written(weight, shared, node):
        node.replace_input_with(weight, shared)
        return str(shared.target)
    tensor = site.weight if weight.op == "get_attr" else None
    channels = _output_channels(layer, tensor) if recipe.per_channel else None
    normalize = recipe.normalize_weights and layer.op.startswith("conv") and _feeds_batchnorm(gm, node)
    key = (weight if tensor is None else id(tensor), normalize, channels)
    if key not in factory.of_weights:
        factory.of_weights[key] = factory.for_weight(site, normalize, channels)
    return _insert(site, layer.weight_operand, "weight_quantizer", factory.of_weights[key])


def _is_written(weight: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether what lies between two nodes may write to what a weight is, or is a view of."""
    source = source_of(weight)
    node = first.next
    while node is not last:
        if writes_first(node) and source_of(node) is source:
            return True
        node = node.next
    return False


def _feeds_batchnorm(gm: SaqGraphModule, node: fx.Node) -> bool:
    """Whether BatchNorm, and nothing else, reads a layer's output."""
    readers = [called_module(gm, user) if user.op == "call_module" else None for user in node.users]
    return bool(readers) and all(isinstance(reader, nn.modules.batchnorm._BatchNorm) for reader in readers)


def _is_weight_quantizer(gm: SaqGraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or "weight_quantizer" not in str(node.target).rpartition(".")[2]:
        return False
    return isinstance(called_module(gm, node), Quantizer)


def _output_channels(layer: LayerAnnotation, weight: Tensor | None) -> tuple[int, int] | None:
    """Axis and number of a weight's output channels; None (one level a tensor) where the axis depends on the call."""
    axis = operator_named(layer.op).channel_axis
    shape = tuple(weight.shape) if weight is not None else layer.weight_shape
    swapped = layer.weight_operand < layer.activation_operand
    if axis is None or shape is None or swapped or len(shape) < 2:
        return None
    return axis % len(shape), shape[axis]


def _insert(site: _Site, operand: int, name: str, quantizer: Quantizer) -> str:
    """Adds a quantizer under the layer's path and its node in front of one operand; the quantizer's path."""
    gm, node = site.graph_module, site.node
    source: fx.Node = node.args[operand]  # type: ignore[assignment]
    path = _add_quantizer(gm, site.name, name, quantizer)
    with gm.graph.inserting_before(node):
        set_arg(node, operand, create_node(gm.graph, "call_module", path, (source,)))
    return path


def _add_quantizer(gm: SaqGraphModule, layer: str, name: str, quantizer: Quantizer) -> str:
    """As `layer.input_quantizer`, or `layer.input_quantizer_1` for a further call of it, `layer@1`; its path."""
    base, _, _ = layer.partition("@")
    holder = attribute_at(gm, base)
    if isinstance(holder, nn.Module):
        name = unused_name(holder, name)
        holder.add_module(name, quantizer)
        return join_path(base, name)
    path = unused_path(gm, join_path(base, name) if holder is None else f"{base}_{name}")
    gm.add_submodule(path, quantizer)
    return path
