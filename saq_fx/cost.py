"""What a network costs at given bit-widths: plain data that leaves the graph, pickles, and is JSON both ways.

`BitOps = MACs * weight bits * activation bits` for one sample; one MAC is one multiply and one add, and a float operand
counts 32 bits (SAQ, arXiv 2111.12273, Sec. 5; EdMIPS, arXiv 2004.05795, Sec. 4).
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cached_property
from typing import Any

from torch import fx

from saq_fx.allocation import Constraint, smallest
from saq_fx.annotation import LayerAnnotation, effective_precision
from saq_fx.errors import CheckpointError, InfeasibleBudgetError, PassError, PatternError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.pass_base import check_facts
from saq_fx.precision import FLOAT_BITS, Budget, Precision

_FLOAT = Precision(FLOAT_BITS, FLOAT_BITS)


@dataclass(frozen=True)
class LayerCost:
    """One layer's share of the cost, for one sample.

    `weight_elements` is 0 for a product of two activations, whose `activation_elements` are those of both, and for a
    further use of a weight that an earlier layer counts. `quantizer_bytes` are the levels of the weight's quantizer.
    Methods take any precision and apply `effective_precision`.
    """

    name: str
    op: str
    group: str
    macs: int
    weight_elements: int
    activation_elements: int
    quantizer_bytes: int = 0
    is_product: bool = False
    reads_network_input: bool = False
    module_classes: tuple[str, ...] = ()
    pinned: Precision | None = None
    precision: Precision | None = None

    @property
    def assigned(self) -> Precision:
        """The precision that the layer has; float where it was given none."""
        return self.precision or _FLOAT

    def effective(self, precision: Precision) -> Precision:
        """The precision that the layer has when it is asked for this one."""
        return effective_precision(precision, is_product=self.is_product, reads_network_input=self.reads_network_input)

    def bitops(self, precision: Precision) -> int:
        """MACs times the bits of both operands."""
        bits = self.effective(precision)
        return self.macs * bits.weight * bits.activation

    def weight_bits(self, precision: Precision) -> int:
        """Bits of all elements of the weight."""
        return self.weight_elements * precision.weight

    def activation_bits(self, precision: Precision) -> int:
        """Bits of all elements of the input activation, or of both activations of a product."""
        return self.activation_elements * self.effective(precision).activation

    def weight_bytes(self, precision: Precision) -> float:
        """Bytes of the weight and, unless it is float, of its quantizer's levels."""
        levels = 0 if precision.weight == FLOAT_BITS else self.quantizer_bytes
        return self.weight_bits(precision) / 8 + levels

    def activation_bytes(self, precision: Precision) -> float:
        """Bytes of the input activation, or of both activations of a product."""
        return self.activation_bits(precision) / 8

    def to_dict(self) -> dict[str, Any]:
        """The layer as JSON data, precisions as "W4A4"."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: str(value) if isinstance(value, Precision) else value for key, value in data.items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "LayerCost":
        """The inverse of `to_dict`; raises CheckpointError on fields that it does not know, lacks or cannot read."""
        if not isinstance(data, Mapping):
            raise CheckpointError(f"no layer of a cost table: {data!r}")
        values = dict(data)
        for key in _COUNTS & values.keys():
            if type(values[key]) is not int or values[key] < 0:
                raise CheckpointError(f"no layer of a cost table: {key!r} is {values[key]!r}, not a count")
        for key in ("pinned", "precision"):
            values[key] = None if values.get(key) is None else Precision.parse(values[key])
        values["module_classes"] = tuple(values.get("module_classes", ()))
        try:
            return LayerCost(**values)
        except TypeError as error:
            raise CheckpointError(f"no layer of a cost table: {error}") from error


_COUNTS = {field.name for field in fields(LayerCost) if field.type in (int, "int")}

Assignment = Mapping[str, Precision]
Candidates = Mapping[str, Sequence[Precision]]


@dataclass(frozen=True)
class CostTable:
    """The layers of a network in the order of execution; a layer is looked up by name.

    Totals are for one sample, under an assignment: layer name -> precision of every layer.
    """

    layers: tuple[LayerCost, ...]

    def __iter__(self) -> Iterator[LayerCost]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerCost:
        """The layer of that name; raises PatternError, which lists the nearest names."""
        for layer in self:
            if layer.name == name:
                return layer
        raise PatternError(_unknown("layer", name, [layer.name for layer in self]))

    @cached_property
    def groups(self) -> dict[str, tuple[LayerCost, ...]]:
        """The layers that share one choice of bits, and a pin if any, by the name of their group."""
        members: dict[str, list[LayerCost]] = defaultdict(list)
        for layer in self:
            members[layer.group].append(layer)
        return {group: tuple(found) for group, found in members.items()}

    @property
    def assigned(self) -> dict[str, Precision]:
        """The precision that each layer has; float where it was given none."""
        return {layer.name: layer.assigned for layer in self}

    def uniform(self, precision: Precision) -> dict[str, Precision]:
        """The assignment of one precision to every layer that is not pinned."""
        return {layer.name: layer.effective(layer.pinned or precision) for layer in self}

    def regrouped(self, group_of: Mapping[str, str]) -> "CostTable":
        """The same layers in other groups, given layer name -> any name of its group.

        A group is named after its first layer. Layers of a pinned group, or not in the mapping, stay where they are.
        """
        free = {group for group, found in self.groups.items() if all(layer.pinned is None for layer in found)}
        first: dict[str, str] = {}
        return CostTable(
            tuple(
                replace(layer, group=first.setdefault(group_of[layer.name], layer.name))
                if layer.group in free and layer.name in group_of
                else layer
                for layer in self
            )
        )

    def choices(self, candidates: Candidates) -> dict[str, tuple[Precision, ...]]:
        """What every group can be, in the order of `groups`.

        A group without candidates keeps its pin, or else the precision that it has.
        Raises PatternError, listing the nearest, for a group that the table does not have.
        """
        for group in candidates:
            if group not in self.groups:
                raise PatternError(_unknown("group", group, list(self.groups)))
        return {
            group: tuple(candidates.get(group, ())) or (_pin(found) or found[0].assigned,)
            for group, found in self.groups.items()
        }

    @property
    def total_macs(self) -> int:
        """MACs of all layers."""
        return sum(layer.macs for layer in self)

    @property
    def total_weight_elements(self) -> int:
        """Elements of all weights."""
        return sum(layer.weight_elements for layer in self)

    @property
    def total_activation_elements(self) -> int:
        """Elements of all layers' input activations."""
        return sum(layer.activation_elements for layer in self)

    def total_bitops(self, assignment: Assignment) -> int:
        """BitOps of all layers."""
        return sum(layer.bitops(precision) for layer, precision in self._with(assignment))

    def total_weight_bytes(self, assignment: Assignment) -> float:
        """Bytes of all weights and of their quantizers' levels."""
        return sum(layer.weight_bytes(precision) for layer, precision in self._with(assignment))

    def average_weight_bits(self, assignment: Assignment) -> float:
        """Bits of a weight element on average; 0 where there are none."""
        total = sum(layer.weight_bits(precision) for layer, precision in self._with(assignment))
        return total / (self.total_weight_elements or 1)

    def average_activation_bits(self, assignment: Assignment) -> float:
        """Bits of an element of the layers' input activations on average; 0 where there are none."""
        total = sum(layer.activation_bits(precision) for layer, precision in self._with(assignment))
        return total / (self.total_activation_elements or 1)

    def _with(self, assignment: Assignment) -> Iterator[tuple[LayerCost, Precision]]:
        for layer in self:
            if layer.name not in assignment:
                raise PatternError(f"the assignment has no precision for layer {layer.name!r}: give every layer one")
            yield layer, assignment[layer.name]

    def to_json(self) -> str:
        """The table as JSON text, one layer a line."""
        lines = ",\n".join(f"  {json.dumps(layer.to_dict())}" for layer in self)
        return f'{{"format": "saq_fx.cost_table", "version": 1, "layers": [\n{lines}\n]}}\n'

    @staticmethod
    def from_json(text: str) -> "CostTable":
        """Read what `to_json` wrote; raises CheckpointError for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"no cost table, for it is not valid JSON: {error}") from error
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (
            "saq_fx.cost_table",
            1,
        ):
            raise CheckpointError("no cost table: 'format' should be 'saq_fx.cost_table' and 'version' 1")
        if not isinstance(data.get("layers"), list):
            raise CheckpointError("no cost table: field 'layers' should be a list")
        return CostTable(tuple(LayerCost.from_dict(layer) for layer in data["layers"]))


def _pin(layers: Iterable[LayerCost]) -> Precision | None:
    return next((layer.pinned for layer in layers if layer.pinned is not None), None)


def cost_table(gm: fx.GraphModule) -> CostTable:
    """What each layer of a prepared model costs, for one sample.

    Raises PassError, saying what to do, for a model that was not prepared, or was without example inputs.
    """
    if not isinstance(gm, SaqGraphModule):
        raise PassError(f"costs are known of a prepared graph, not of a {type(gm).__name__}: call prepare_saq first")
    check_facts(gm, frozenset({"annotations", "shapes"}), "cost_table")
    return CostTable(tuple(_layer_cost(gm, layer) for _, layer in layers(gm)))


def _layer_cost(gm: SaqGraphModule, layer: LayerAnnotation) -> LayerCost:
    activation, other = (math.prod(shape or ()) for shape in (layer.activation_shape, layer.weight_shape))
    # The first layer of a group counts the weight that the group shares.
    has_weight = not layer.is_product and layer.name == layer.choice_group
    return LayerCost(
        name=layer.name,
        op=layer.op,
        group=layer.choice_group,
        macs=layer.macs or 0,
        weight_elements=other if has_weight else 0,
        activation_elements=activation + other if layer.is_product else activation,
        quantizer_bytes=_parameter_bytes(gm, layer.weight_quantizer) if has_weight else 0,
        is_product=layer.is_product,
        reads_network_input=layer.reads_network_input,
        module_classes=layer.module_classes,
        pinned=layer.pinned,
        precision=layer.precision,
    )


def _parameter_bytes(gm: SaqGraphModule, path: str | None) -> int:
    parameters = gm.get_submodule(path).parameters() if path else ()
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _unknown(kind: str, name: str, known: list[str]) -> str:
    nearest = get_close_matches(name, known, cutoff=0.0)
    return f"the cost table has no {kind} {name!r}; the nearest are {', '.join(nearest) or 'none'}"


@dataclass(frozen=True)
class _Measure:
    """A total that a budget limits: what a layer adds to it, and how much of it one unit of the budget's value is."""

    name: str
    unit: str
    of_layer: Callable[[LayerCost, Precision], float]
    scale: int

    def table(self, costs: CostTable, choices: Candidates) -> list[list[float]]:
        """What each choice of each group adds."""
        return [
            [sum(self.of_layer(layer, choice) for layer in found) for choice in choices[group]]
            for group, found in costs.groups.items()
        ]

    def limit(self, value: float) -> float:
        """The total that a budget's value allows: of the number as written, 0.29 of 100 is 29 and not a little less."""
        return float(min(Fraction(repr(value)) * self.scale, Fraction(sys.float_info.max)))

    def value(self, total: float) -> float:
        """The smallest value of a budget that allows a total."""
        value = total / self.scale
        while self.limit(value) < total:
            value = math.nextafter(value, math.inf)
        return value


def _measures(budget: Budget, costs: CostTable) -> list[_Measure]:
    if budget.kind == "weight_bytes":
        return [_Measure("weight bytes", "bytes", LayerCost.weight_bytes, 1)]
    if budget.kind == "average_bits":
        averages = (
            _Measure("weight bits", "bits", LayerCost.weight_bits, costs.total_weight_elements),
            _Measure("activation bits", "bits", LayerCost.activation_bits, costs.total_activation_elements),
        )
        return [measure for measure in averages if measure.scale]
    reference = 1 if budget.of is None else costs.total_bitops({layer.name: budget.of for layer in costs})
    return [_Measure("BitOps", "BitOps", LayerCost.bitops, reference or 1)]


def budget_constraints(
    budget: Budget | str | Sequence[Budget | str], costs: CostTable, candidates: Candidates
) -> list[Constraint]:
    """Budgets as the constraints of `allocate_under`.

    Cost tables have a row for each of `costs.choices(candidates)`, in that order: groups that have no choice are rows
    of one. A ratio is of the BitOps with every layer, pinned or not, at the precision that the budget names.

    Args:
        candidates: group -> precisions to choose from, for every group that has a choice.

    Raises:
        InfeasibleBudgetError: a budget that no choice keeps, with the smallest one that can be kept.
        PatternError: candidates for a group that `costs` does not have.
    """
    choices = costs.choices(candidates)
    constraints = []
    for each in map(Budget.parse, [budget] if isinstance(budget, Budget | str) else budget):
        least, _ = feasible_range(each, costs, candidates)
        if each.value < least:
            least_budget = Budget(each.kind, least, each.of)
            raise InfeasibleBudgetError(f"budget {each}: the smallest feasible one is {least_budget}")
        constraints += [
            Constraint(measure.table(costs, choices), measure.limit(each.value), measure.name, measure.unit)
            for measure in _measures(each, costs)
        ]
    return constraints


def feasible_range(budget: Budget, costs: CostTable, candidates: Candidates) -> tuple[float, float]:
    """The smallest value of such a budget that can be kept, and the largest one that still limits anything.

    Both are in the unit of `budget.value`, which itself plays no part.
    """
    choices = costs.choices(candidates)
    ends = [(0.0, 0.0)]
    for measure in _measures(budget, costs):
        table = measure.table(costs, choices)
        ends.append((measure.value(smallest(table)), measure.value(sum(map(max, table)))))
    return max(least for least, _ in ends), max(most for _, most in ends)
