"""Gives every layer its bit-widths."""

from dataclasses import dataclass, field
from typing import ClassVar

from saq_fx.annotation import LayerAnnotation, effective_precision, update
from saq_fx.errors import PassError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.pass_base import Pass, PassResult
from saq_fx.precision import FLOAT_BITS, LayerKey, Policy, Precision


@dataclass(frozen=True)
class AssignPrecision(Pass):
    """Writes the policy's precision into each layer's annotation.

    First and last layers, and those that share a weight with one, are pinned to `first_last`; only a policy's entry
    under such a layer's exact name overrides that. A product of two activations takes the activation width for both
    operands. The network's input is not quantized: it came with 8 bits, and a quantized first layer counts it so (SAQ,
    Sec. 5).
    """

    policy: Policy = field(default_factory=lambda: Policy.uniform("W4A4"))
    first_last: Precision | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"annotations"})
    gives: ClassVar[frozenset[str]] = frozenset({"precision"})

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Annotates `gm` in place.

        Raises:
            PatternError: a name or pattern of the policy matches no layer.
            PassError: layers that share a weight would get different weight bits.
        """
        found = list(layers(gm))
        at_an_end = {layer.choice_group for _, layer in found if layer.position}
        pinned = {
            layer.name: self.first_last if layer.choice_group in at_an_end and self.first_last else layer.pinned
            for _, layer in found
        }
        keys = [LayerKey(each.name, each.op, each.module_classes, pinned[each.name]) for _, each in found]
        resolved = self.policy.resolve(keys)
        assigned = []
        for node, layer in found:
            precision = _effective(layer, resolved[layer.name])
            assigned.append(update(node, precision=precision, pinned=pinned[layer.name]))
        _check_shared_weights(assigned)
        pairs = zip((layer for _, layer in found), assigned, strict=True)
        return PassResult(gm, any((old.precision, old.pinned) != (new.precision, new.pinned) for old, new in pairs))


def _effective(layer: LayerAnnotation, wanted: Precision | None) -> Precision:
    """The precision that a layer can have; without a wish it stays as it is."""
    precision = wanted or layer.precision or Precision(FLOAT_BITS, FLOAT_BITS)
    return effective_precision(precision, is_product=layer.is_product, reads_network_input=layer.reads_network_input)


def _check_shared_weights(assigned: list[LayerAnnotation]) -> None:
    first: dict[str, LayerAnnotation] = {}
    for layer in assigned:
        other = first.setdefault(layer.choice_group, layer)
        if layer.precision is None or other.precision is None or layer.precision.weight == other.precision.weight:
            continue
        raise PassError(
            f"layers {other.name} and {layer.name} share one weight but are to have {other.precision.weight} and "
            f"{layer.precision.weight} weight bits: give both the same"
        )
