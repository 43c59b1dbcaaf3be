"""The free choices of bits in a relaxed graph, and the cost that its mixtures are expected to have."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import networkx as nx
import torch
from torch import Tensor

from saq_fx.annotation import NETWORK_INPUT_BITS, LayerAnnotation
from saq_fx.cost import budget_constraints, cost_table
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.precision import Budget, Precision


@dataclass(frozen=True)
class Choice:
    """One free choice of bits, for all layers of a group.

    `weight` and `activation` are mixtures that hold its logits: one of those that share them. A product of two
    activations has no weight mixture, a layer that reads the network's input no activation mixture.
    """

    name: str
    layers: tuple[str, ...]
    weight: MixtureQuantizer | None
    activation: MixtureQuantizer | None

    @property
    def mixtures(self) -> tuple[MixtureQuantizer, ...]:
        """The mixtures that there are, one for each vector of logits, weights first."""
        found = [each for each in (self.weight, self.activation) if each is not None]
        return tuple(found[:1] if self._has_equal_bits else found)

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each of `mixtures`: that of the choice, and the operand."""
        operands = {"weight": self.weight, "activation": self.activation}
        found = [f"{self.name} {operand}" for operand, mixture in operands.items() if mixture is not None]
        return (self.name,) if self._has_equal_bits else tuple(found)

    @property
    def _has_equal_bits(self) -> bool:
        return self.weight is not None and self.activation is not None and self.weight.logits is self.activation.logits

    def precisions(self) -> list[Precision]:
        """What can be chosen: every pair of weight bits and activation bits, or every width where both are one."""
        if self.weight is None or self._has_equal_bits:
            return [Precision(bits, bits) for bits in self.mixtures[0].candidates]
        activation = (NETWORK_INPUT_BITS,) if self.activation is None else self.activation.candidates
        return [Precision(*pair) for pair in product(self.weight.candidates, activation)]

    def over_pairs(self, combine: Callable[[Tensor, Tensor], Tensor], values: Sequence[Tensor]) -> Tensor:
        """One value for each of `precisions()`, combined from those of each mixture's candidates."""
        if len(values) == 1:
            return values[0]
        of_weight, of_activation = values
        return combine(of_weight[:, None], of_activation).flatten()

    def probabilities(self) -> Tensor:
        """How likely each of `precisions()` is, the two operands being independent."""
        return self.over_pairs(torch.mul, [mixture.probabilities() for mixture in self.mixtures])

    def log_probabilities(self) -> Tensor:
        """Their logarithms, finite however unlikely a precision is."""
        return self.over_pairs(torch.add, [mixture.log_probabilities() for mixture in self.mixtures])


def choices(gm: SaqGraphModule) -> list[Choice]:
    """The free choices of a relaxed graph, in the order of execution; none of a graph without mixtures.

    Layers belong to one choice if any of their mixtures have the same logits.
    """
    found = {layer.name: layer for _, layer in layers(gm)}
    sharing: nx.Graph[str | int] = nx.Graph()
    for name, layer in found.items():
        for path in (layer.weight_quantizer, layer.input_quantizer):
            mixture = _mixture(gm, path)
            if mixture is not None:
                sharing.add_edge(name, id(mixture.logits))
    groups = [set(component) for component in nx.connected_components(sharing)]
    return [_choice(gm, [layer for name, layer in found.items() if name in group]) for group in groups]


def _choice(gm: SaqGraphModule, group: list[LayerAnnotation]) -> Choice:
    weights = [layer.weight_quantizer for layer in group if not layer.is_product]
    activations = [layer.input_quantizer for layer in group]
    names = tuple(layer.name for layer in group)
    return Choice(group[0].choice_group, names, _first_mixture(gm, weights), _first_mixture(gm, activations))


def _first_mixture(gm: SaqGraphModule, paths: Iterable[str | None]) -> MixtureQuantizer | None:
    return next((found for path in paths if (found := _mixture(gm, path)) is not None), None)


def _mixture(gm: SaqGraphModule, path: str | None) -> MixtureQuantizer | None:
    module = None if path is None else gm.get_submodule(path)
    return module if isinstance(module, MixtureQuantizer) else None


def weight_mixtures(gm: SaqGraphModule) -> list[MixtureQuantizer]:
    """The mixtures of weights, not of a product's second operand; each once."""
    found = (_mixture(gm, layer.weight_quantizer) for _, layer in layers(gm) if not layer.is_product)
    return list(dict.fromkeys(each for each in found if each is not None))


class ExpectedShares:
    """The cost that each constraint expects of the mixtures, as a share of its limit; differentiable.

    Closed form: a layer's expected BitOps are `MACs E[b_w] E[b_a]`; in a product, whose operands have the same
    bits, `MACs E[b**2]`.

    Raises:
        InfeasibleBudgetError: a budget that no choice keeps.
    """

    def __init__(self, gm: SaqGraphModule, choices: Sequence[Choice], budgets: Sequence[Budget]) -> None:
        costs = cost_table(gm).regrouped({layer: choice.name for choice in choices for layer in choice.layers})
        candidates = {choice.name: choice.precisions() for choice in choices}
        constraints = budget_constraints(budgets, costs, candidates)
        like = choices[0].mixtures[0].logits
        tables = {
            group: like.new_tensor([[cost / each.limit for cost in each.costs[row]] for each in constraints]).T
            for row, group in enumerate(costs.groups)
        }
        self.choices = choices
        # For each choice, the share that each of its precisions takes of each limit.
        self.tables = [tables.pop(choice.name) for choice in choices]
        self.fixed = sum((table[0] for table in tables.values()), like.new_zeros(len(constraints)))

    def __call__(self) -> Tensor:
        """One share for each constraint, (constraints,)."""
        pairs = zip(self.tables, self.choices, strict=True)
        return sum(((choice.probabilities() @ table) for table, choice in pairs), self.fixed)
