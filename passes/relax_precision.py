"""Puts a mixture over bit-widths in the place of each searchable quantizer."""

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from saq_fx.annotation import LayerAnnotation
from saq_fx.errors import PrecisionError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.pass_base import Pass, PassResult
from saq_fx.precision import MAX_BITS, MIN_BITS

CANDIDATES = (2, 3, 4, 6)


@dataclass(frozen=True)
class RelaxPrecision(Pass):
    """Makes the bits of every layer that is not pinned a mixture: `Q(v) -> sum_b softmax(z)_b Q_b(v)`.

    A mixture takes the place of the quantizer in the module tree: the graph keeps its nodes, and a layer runs one
    operation however many candidates it has. Each candidate has its own clipping level, fitted at the first forward.
    Layers that share a weight share one choice: one `z` for weights, one for activations. Both operands of a product
    of activations have the same bits, hence one `z`. (EdMIPS, arXiv 2004.05795, Sec. 4.)

    Args:
        weight: candidate bits of weights.
        activation: candidate bits of activations.

    Raises:
        PrecisionError: candidates that repeat, or of less than 2 or more than 8 bits.
    """

    weight: tuple[int, ...] = CANDIDATES
    activation: tuple[int, ...] = CANDIDATES
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "quantizers"})

    def __post_init__(self) -> None:
        for operand, bits in (("weight", self.weight), ("activation", self.activation)):
            if not bits or len(set(bits)) < len(bits) or not all(MIN_BITS <= each <= MAX_BITS for each in bits):
                raise PrecisionError(
                    f"{operand} candidates are {bits}: give different widths of {MIN_BITS} to {MAX_BITS} bits, "
                    "at least one"
                )

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Replaces quantizer modules of `gm`; mixtures that are there already stay as they are."""
        modified = False
        for group in _searchable_groups(gm):
            weights = (layer.weight_quantizer for layer in group if not layer.is_product)
            activations = [layer.input_quantizer for layer in group]
            activations += [layer.weight_quantizer for layer in group if layer.is_product]
            modified |= _replace(gm, weights, self.weight)
            modified |= _replace(gm, activations, self.activation)
        return PassResult(gm, modified)


def _searchable_groups(gm: SaqGraphModule) -> list[list[LayerAnnotation]]:
    """The layers that share a choice, for every choice that no pin of one of them takes away."""
    groups: dict[str, list[LayerAnnotation]] = defaultdict(list)
    for _, layer in layers(gm):
        groups[layer.choice_group].append(layer)
    return [group for group in groups.values() if all(layer.pinned is None for layer in group)]


def _replace(gm: SaqGraphModule, paths: Iterable[str | None], bits: tuple[int, ...]) -> bool:
    """Puts mixtures with common logits, all zero, in the place of the quantizers at `paths`."""
    quantizers: dict[str, Any] = {path: gm.get_submodule(path) for path in paths if path is not None}
    plain = {path: each for path, each in quantizers.items() if not isinstance(each, MixtureQuantizer)}
    if plain:
        like = next(next(iter(plain.values())).parameters())
        logits = nn.Parameter(torch.zeros(len(bits), device=like.device, dtype=like.dtype))
        for path, quantizer in plain.items():
            candidates = [copy.deepcopy(quantizer) for _ in bits]
            for candidate, candidate_bits in zip(candidates, bits, strict=True):
                candidate.set_bits(candidate_bits)
                # The width that the quantizer had must not be ahead of the others.
                candidate.initialized = False
            gm.set_submodule(path, MixtureQuantizer(candidates, logits))
    return bool(plain)
