"""Puts a quantizer node on every quantized tensor."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx, nn

from saq_fx.annotation import LayerAnnotation, join_path, layer_nodes, record_of, update, update_record
from saq_fx.dataflow import tensor_at
from saq_fx.errors import PatternError
from saq_fx.graph import SaqGraphModule, graphs, layers, unused_path
from saq_fx.operators import operator_named
from saq_fx.pass_base import Pass, PassResult
from saq_fx.precision import LayerKey
from saq_fx.quantizers import ClipActivationQuantizer, ClipWeightQuantizer, Quantizer, StepQuantizer
from saq_fx.recipe import Recipe


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
        scheme = self.recipe.scheme or ("lsq" if _has_attention(gm) else "clip")
        signed = _signed_overrides(gm, self.recipe)
        modified = record_of(gm).recipe != self.recipe
        for path, part in graphs(gm):
            for node, layer in list(layer_nodes(part.graph)):
                layer = update(node, activation_signed=signed.get(layer.name, layer.activation_signed))
                site = _Site(part, node, layer, layer.name.removeprefix(path).removeprefix("."))
                modified |= _insert_both(site, scheme, self.recipe)
        update_record(gm, recipe=self.recipe)
        return PassResult(gm, modified)


@dataclass(frozen=True)
class _Site:
    """A layer that gets its quantizers: its graph, node and annotation, and its name within the graph."""

    graph_module: SaqGraphModule
    node: fx.Node
    layer: LayerAnnotation
    name: str


def _insert_both(site: _Site, scheme: str, recipe: Recipe) -> bool:
    layer = site.layer
    lacks_input = layer.input_quantizer is None and not layer.reads_network_input
    if lacks_input:
        make = _activation_quantizer_maker(layer, scheme, layer.activation_signed, recipe)
        _insert(site, layer.activation_operand, "input_quantizer", make)
    if layer.weight_quantizer is None:
        _insert_second(site, scheme, recipe)
    return lacks_input or layer.weight_quantizer is None


def _has_attention(gm: SaqGraphModule) -> bool:
    return any(layer.is_product for _, layer in layers(gm))


def _signed_overrides(gm: SaqGraphModule, recipe: Recipe) -> dict[str, bool]:
    keys = [LayerKey(layer.name, layer.op, layer.module_classes) for _, layer in layers(gm)]
    overrides = {}
    for pattern, signed in recipe.signed.items():
        matched = [key.name for key in keys if key.name == pattern or key.matches(pattern)]
        if not matched:
            raise PatternError(f"the recipe's signed pattern {pattern!r} matches no layer; see precision_report(gm)")
        overrides.update(dict.fromkeys(matched, signed))
    return overrides


def _insert_second(site: _Site, scheme: str, recipe: Recipe) -> None:
    gm, node, layer = site.graph_module, site.node, site.layer
    if layer.is_product:
        make = _activation_quantizer_maker(layer, scheme, layer.weight_signed, recipe)
        _insert(site, layer.weight_operand, "other_quantizer", make)
        return
    weight: fx.Node = node.args[layer.weight_operand]  # type: ignore[assignment]
    shared = next((user for user in weight.users if _is_weight_quantizer(gm, user)), None)
    if shared is not None:
        node.replace_input_with(weight, shared)
        update(node, weight_quantizer=str(shared.target))
        return
    channels = _output_channels(gm, layer, weight) if recipe.per_channel else None
    normalize = recipe.normalize_weights and layer.op.startswith("conv") and _feeds_batchnorm(gm, node)
    _insert(
        site,
        layer.weight_operand,
        "weight_quantizer",
        lambda device, dtype: _weight_quantizer(layer, scheme, normalize, channels, device, dtype),
    )


def _feeds_batchnorm(gm: SaqGraphModule, node: fx.Node) -> bool:
    """Whether BatchNorm, and nothing else, reads a layer's output."""
    readers = [gm.get_submodule(str(user.target)) if user.op == "call_module" else None for user in node.users]
    return bool(readers) and all(isinstance(reader, nn.modules.batchnorm._BatchNorm) for reader in readers)


def _is_weight_quantizer(gm: SaqGraphModule, node: fx.Node) -> bool:
    name = str(node.target).rpartition(".")[2]
    return (
        node.op == "call_module"
        and "weight_quantizer" in name
        and isinstance(gm.get_submodule(str(node.target)), Quantizer)
    )


QuantizerMaker = Callable[[torch.device | None, torch.dtype | None], Quantizer]


def _activation_quantizer_maker(layer: LayerAnnotation, scheme: str, signed: bool, recipe: Recipe) -> QuantizerMaker:
    bits = _precision(layer)[1]
    if signed or recipe.activation_offsets:
        return lambda device, dtype: StepQuantizer(bits, signed=signed, offset=True, device=device, dtype=dtype)
    if scheme == "lsq":
        return lambda device, dtype: StepQuantizer(bits, signed=False, device=device, dtype=dtype)
    return lambda device, dtype: ClipActivationQuantizer(bits, device=device, dtype=dtype)


def _weight_quantizer(
    layer: LayerAnnotation,
    scheme: str,
    normalize: bool,
    channels: tuple[int, int] | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Quantizer:
    bits = _precision(layer)[0]
    axis, count = channels if channels is not None else (0, None)
    if scheme == "lsq":
        return StepQuantizer(bits, signed=True, channels=count, channel_axis=axis, device=device, dtype=dtype)
    return ClipWeightQuantizer(bits, channels=count, channel_axis=axis, normalize=normalize, device=device, dtype=dtype)


def _precision(layer: LayerAnnotation) -> tuple[int, int]:
    if layer.precision is None:
        raise ValueError(f"layer {layer.name} has no precision")
    return layer.precision.weight, layer.precision.activation


def _output_channels(gm: SaqGraphModule, layer: LayerAnnotation, weight: fx.Node) -> tuple[int, int] | None:
    """Axis and number of a weight's output channels; None (one level a tensor) where the axis depends on the call."""
    axis = operator_named(layer.op).channel_axis
    tensor = tensor_at(gm, str(weight.target)) if weight.op == "get_attr" else None
    shape = tuple(tensor.shape) if tensor is not None else layer.weight_shape
    swapped = layer.weight_operand < layer.activation_operand
    if axis is None or shape is None or swapped or len(shape) < 2:
        return None
    return axis % len(shape), shape[axis]


def _insert(site: _Site, operand: int, name: str, make: QuantizerMaker) -> None:
    """Adds a quantizer module under the layer's path and its node in front of one operand."""
    gm, node, layer = site.graph_module, site.node, site.layer
    source: fx.Node = node.args[operand]  # type: ignore[assignment]
    path = _quantizer_path(gm, site.name, name)
    weight = tensor_at(gm, layer.weight) if layer.weight is not None else None
    reference = next(gm.parameters(), None) if weight is None else weight
    device = reference.device if reference is not None else None
    dtype = reference.dtype if reference is not None and reference.is_floating_point() else None
    gm.add_submodule(path, make(device, dtype))
    with gm.graph.inserting_after(source) if name == "weight_quantizer" else gm.graph.inserting_before(node):
        quantizer = gm.graph.call_module(path, (source,))
    args = list(node.args)
    args[operand] = quantizer
    node.args = tuple(args)
    field_name = "input_quantizer" if name == "input_quantizer" else "weight_quantizer"
    update(node, **{field_name: path})


def _quantizer_path(gm: SaqGraphModule, layer: str, name: str) -> str:
    """`layer.input_quantizer`; `layer.input_quantizer_1` for a further call of it, `layer@1`."""
    base, _, _ = layer.partition("@")
    holder: nn.Module | None = gm
    for part in base.split(".") if base else []:
        holder = getattr(holder, part, None)
    if holder is not None and not isinstance(holder, nn.Module):
        return unused_path(gm, f"{base}_{name}")
    return unused_path(gm, join_path(base, name))
