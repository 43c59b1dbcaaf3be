"""Puts a mixture over bit-widths in the place of each searchable quantizer."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral
from typing import Any, ClassVar

import networkx as nx
import torch
from torch import nn

from saq_fx.annotation import LayerAnnotation
from saq_fx.errors import PatternError, PrecisionError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.pass_base import Pass, PassResult
from saq_fx.precision import MAX_BITS, MIN_BITS, LayerKey

CANDIDATES = (2, 3, 4, 6)
OPERANDS = ("weight", "activation")

Bits = Sequence[int]
Group = list[LayerAnnotation]


@dataclass(frozen=True)
class RelaxPrecision(Pass):
    """Makes the bits of every layer that is not pinned a mixture: `Q(v) -> sum_b softmax(z)_b Q_b(v)`.

    A mixture takes the place of the quantizer in the module tree: the graph keeps its nodes, and a layer runs one
    operation however many candidates it has. Each candidate has its own clipping level, fitted at the first forward.
    Layers that share a weight share one choice: one `z` for weights, one for activations. Both operands of a product
    of activations have the same bits, hence one `z`. (EdMIPS, arXiv 2004.05795, Sec. 4.)

    Patterns are those of a policy: a name, a glob, "op:conv2d" or "class:BasicBlock", of layers that are not pinned.

    Args:
        weight: candidate bits of weights; a single one leaves no choice.
        activation: candidate bits of activations.
        overrides: pattern -> other candidates, for both operands or a mapping from "weight" or "activation"; of
            several patterns the last one wins.
        same_bits: each a pattern, or several: all layers that any of them matches share one choice.
        equal_operands: patterns of layers whose weights have the same bits as their activations.

    Raises:
        PrecisionError: candidates that repeat, or of less than 2 or more than 8 bits; different ones for layers or
            operands that share a choice.
        PatternError: a pattern that matches no layer with a choice.
    """

    weight: Bits = CANDIDATES
    activation: Bits = CANDIDATES
    overrides: Mapping[str, Bits | Mapping[str, Bits]] = field(default_factory=dict)
    same_bits: Sequence[str | Sequence[str]] = ()
    equal_operands: Sequence[str] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "quantizers"})

    def __post_init__(self) -> None:
        for operand in OPERANDS:
            _check(f"{operand} candidates", getattr(self, operand))
        for pattern, bits in self.overrides.items():
            for operand, of_operand in _by_operand(bits).items():
                if operand not in OPERANDS:
                    raise PrecisionError(f"candidates of {operand!r} for {pattern!r}: give those of {OPERANDS}")
                _check(f"{operand} candidates of {pattern!r}", of_operand)

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Replaces quantizer modules of `gm`; mixtures that are there already stay as they are."""
        groups = searchable_groups(gm)
        free = [layer for group in groups for layer in group]
        patterns = [*self.overrides, *self.equal_operands, *(each for one in self.same_bits for each in _several(one))]
        _check_patterns(patterns, free)
        modified = False
        for group in self._merged(groups):
            weights = [layer.weight_quantizer for layer in group if not layer.is_product]
            activations = [layer.input_quantizer for layer in group]
            activations += [layer.weight_quantizer for layer in group if layer.is_product]
            bits = {operand: self._candidates(operand, group) for operand in OPERANDS}
            if any(_matches(layer, pattern) for layer in group for pattern in self.equal_operands):
                _check_equal(bits, group)
                modified |= _replace(gm, [*weights, *activations], bits["weight"] or bits["activation"])
            else:
                modified |= _replace(gm, weights, bits["weight"])
                modified |= _replace(gm, activations, bits["activation"])
        return PassResult(gm, modified)

    def _merged(self, groups: list[Group]) -> list[Group]:
        """The groups, those put together that `same_bits` names, in the order of execution."""
        sharing: nx.Graph[int] = nx.Graph()
        for index, _ in enumerate(groups):
            sharing.add_node(index)
        for one in self.same_bits:
            named = [
                index
                for index, group in enumerate(groups)
                if any(_matches(layer, pattern) for layer in group for pattern in _several(one))
            ]
            nx.add_path(sharing, named)
        return [
            [each for index in sorted(found) for each in groups[index]] for found in nx.connected_components(sharing)
        ]

    def _candidates(self, operand: str, group: Group) -> Bits:
        """What the layers of a group can choose from."""
        found: dict[Bits, str] = {}
        for layer in group:
            bits = getattr(self, operand)
            for pattern, override in self.overrides.items():
                if _matches(layer, pattern):
                    bits = _by_operand(override).get(operand, bits)
            if not (operand == "weight" and layer.is_product):
                found.setdefault(tuple(bits), layer.name)
        if len(found) > 1:
            listed = " and ".join(f"{name} {bits}" for bits, name in found.items())
            raise PrecisionError(f"layers that share a choice have different {operand} candidates: {listed}")
        return next(iter(found), ())


def _by_operand(bits: Bits | Mapping[str, Bits]) -> Mapping[str, Bits]:
    return bits if isinstance(bits, Mapping) else dict.fromkeys(OPERANDS, bits)


def _several(patterns: str | Sequence[str]) -> Sequence[str]:
    return [patterns] if isinstance(patterns, str) else patterns


def _check(what: str, bits: Bits) -> None:
    whole = (
        not isinstance(bits, str) and isinstance(bits, Sequence) and all(isinstance(each, Integral) for each in bits)
    )
    if not whole or not bits or len(set(bits)) < len(bits) or not all(MIN_BITS <= each <= MAX_BITS for each in bits):
        raise PrecisionError(
            f"{what} are {bits!r}: give different widths of {MIN_BITS} to {MAX_BITS} bits, at least one"
        )


def _check_equal(bits: Mapping[str, Bits], group: Group) -> None:
    if bits["weight"] and bits["weight"] != bits["activation"]:
        raise PrecisionError(
            f"layer {group[0].name}: weights and activations are to have the same bits, but their candidates are "
            f"{bits['weight']} and {bits['activation']}: give both the same"
        )


def _check_patterns(patterns: Iterable[str], free: Group) -> None:
    for pattern in patterns:
        if not any(_matches(layer, pattern) for layer in free):
            nearest = get_close_matches(pattern, [layer.name for layer in free], cutoff=0.0)
            raise PatternError(
                f"{pattern!r} matches no layer that has a choice; the nearest are {', '.join(nearest) or 'none'}. "
                "First and last layers are pinned: Recipe(first_last=None) leaves them free"
            )


def _matches(layer: LayerAnnotation, pattern: str) -> bool:
    return LayerKey(layer.name, layer.op, layer.module_classes).matches(pattern)


def searchable_groups(gm: SaqGraphModule) -> list[Group]:
    """The layers that share a weight, for every weight that no pin of one of them takes away."""
    groups: dict[str, Group] = defaultdict(list)
    for _, layer in layers(gm):
        groups[layer.choice_group].append(layer)
    return [group for group in groups.values() if all(layer.pinned is None for layer in group)]


def _replace(gm: SaqGraphModule, paths: Iterable[str | None], bits: Bits) -> bool:
    """Puts mixtures with common logits, all zero, in the place of the quantizers at `paths`."""
    quantizers: dict[str, Any] = {path: gm.get_submodule(path) for path in paths if path is not None}
    plain = {path: each for path, each in quantizers.items() if not isinstance(each, MixtureQuantizer)}
    if plain:
        like = next(next(iter(plain.values())).parameters())
        # Steps of a search are smaller than what half precision resolves.
        dtype = torch.promote_types(like.dtype, torch.float)
        logits = nn.Parameter(torch.zeros(len(bits), device=like.device, dtype=dtype))
        for path, quantizer in plain.items():
            candidates = [copy.deepcopy(quantizer) for _ in bits]
            for candidate, candidate_bits in zip(candidates, bits, strict=True):
                candidate.set_bits(candidate_bits)
                # The width that the quantizer had must not be ahead of the others.
                candidate.initialized = False
            gm.set_submodule(path, MixtureQuantizer(candidates, logits))
    return bool(plain)
