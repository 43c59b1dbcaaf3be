"""What a search of bits found: scores for every choice, a policy for any budget."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from saq_fx.allocation import allocate_under, frontier
from saq_fx.cost import CostTable, budget_constraints, feasible_range
from saq_fx.errors import CheckpointError, InfeasibleBudgetError, PatternError, PrecisionError, SaqError
from saq_fx.passes.search_asga import SearchStep
from saq_fx.precision import Budget, Policy, Precision, write_whole

_FORMAT = "saq_fx.search"
_VERSION = 1

Budgets = Budget | str | Sequence[Budget | str]


@dataclass(frozen=True)
class ScoredChoice:
    """What the layers of one group can be, and the score of each precision: the loss it saves, to first order."""

    group: str
    layers: tuple[str, ...]
    precisions: tuple[Precision, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.precisions) or len(set(self.precisions)) < len(self.precisions):
            raise PrecisionError(f"choice {self.group!r}: give different precisions, and a score for each")
        if any(map(math.isnan, self.scores)):
            raise PrecisionError(f"choice {self.group!r} has a score that is no number")

    def without(self, index: int) -> "ScoredChoice":
        """The same choice with one precision less."""
        precisions, scores = list(self.precisions), list(self.scores)
        del precisions[index], scores[index]
        return replace(self, precisions=tuple(precisions), scores=tuple(scores))


Scored = Mapping[str, ScoredChoice]


@dataclass(frozen=True)
class FrontierPoint:
    """One efficient policy: its total BitOps and its score, in loss saved."""

    bitops: float
    score: float
    policy: Policy


@dataclass(frozen=True)
class SearchResult:
    """Scores of a search, from which the best policy under any budget follows in milliseconds.

    `costs` are those of the network that was searched; `history` has one entry for each step.
    """

    budgets: tuple[Budget, ...]
    choices: tuple[ScoredChoice, ...]
    costs: CostTable
    history: tuple[SearchStep, ...] = ()

    @cached_property
    def policy(self) -> Policy:
        """The best policy under the search's own budget; it names every layer."""
        return self.policy_for(self.budgets)

    def policy_for(self, budget: Budgets, costs: CostTable | None = None) -> Policy:
        """The best policy under another budget, or for another network whose layers have the same names.

        Args:
            costs: of the other network, from `cost_table`; None for the one that was searched.

        Raises:
            InfeasibleBudgetError: with the smallest feasible figure.
            PatternError: layers of the other network that the search did not score.
        """
        costs = self._costs(costs)
        scored = self._scored_groups(costs)
        return _policy(costs, scored, _solve(budget, costs, scored))

    def frontier(self, costs: CostTable | None = None) -> list[FrontierPoint]:
        """The efficient policies between the cheapest and the best, by total BitOps (upper convex hull)."""
        costs = self._costs(costs)
        scored = self._scored_groups(costs)
        bitops = [
            [float(sum(layer.bitops(precision) for layer in costs.groups[group])) for precision in precisions]
            for group, precisions in costs.choices(_precisions(scored)).items()
        ]
        corners = frontier(bitops, _scores(costs, scored))
        return [FrontierPoint(cost, score, _policy(costs, scored, chosen)) for cost, score, chosen in corners]

    def feasible_budgets(self) -> list[tuple[Budget, Budget]]:
        """The smallest budget that can be kept and the largest that limits anything, of each kind searched under."""
        candidates = _precisions(self._scored_groups(self.costs))
        ranges = [feasible_range(budget, self.costs, candidates) for budget in self.budgets]
        return [
            (replace(budget, value=least), replace(budget, value=most))
            for budget, (least, most) in zip(self.budgets, ranges, strict=True)
        ]

    @cached_property
    def budget_used(self) -> float:
        """The share that the policy takes of the search's budget; of several, the largest."""
        scored = self._scored_groups(self.costs)
        chosen = _solve(self.budgets, self.costs, scored)
        constraints = budget_constraints(self.budgets, self.costs, _precisions(scored))
        totals = (sum(row[index] for row, index in zip(each.costs, chosen, strict=True)) for each in constraints)
        return max(total / each.limit for total, each in zip(totals, constraints, strict=True))

    @cached_property
    def margins(self) -> dict[str, float]:
        """Layer -> how sure its choice is under the search's budget, in loss.

        That is what the best policy loses in score if this layer has to take another precision; infinite where the
        budget leaves no other.
        """
        scored = self._scored_groups(self.costs)
        chosen = dict(zip(self.costs.groups, _solve(self.budgets, self.costs, scored), strict=True))
        best, margins = _total_score(scored, chosen), {}
        for group, choice in scored.items():
            others = {**scored, group: choice.without(chosen[group])}
            margins.update(dict.fromkeys(choice.layers, best - self._best_score(others)))
        return margins

    def _costs(self, costs: CostTable | None) -> CostTable:
        """The costs of a network, its layers grouped as they share choices here."""
        if costs is None:
            return self.costs
        return costs.regrouped({layer: choice.group for choice in self.choices for layer in choice.layers})

    def _best_score(self, scored: Scored) -> float:
        """The best total under the search's budget; minus infinity where nothing is left that keeps it."""
        if not all(choice.precisions for choice in scored.values()):
            return -math.inf
        try:
            chosen = dict(zip(self.costs.groups, _solve(self.budgets, self.costs, scored), strict=True))
        except InfeasibleBudgetError:
            return -math.inf
        return _total_score(scored, chosen)

    def _scored_groups(self, costs: CostTable) -> dict[str, ScoredChoice]:
        """Group of `costs` -> the choice that its layers have, for all that no pin decides."""
        of_layer = {layer: choice for choice in self.choices for layer in choice.layers}
        scored, unknown = {}, []
        for group, members in costs.groups.items():
            if any(member.pinned is not None for member in members):
                continue
            found = next((of_layer[member.name] for member in members if member.name in of_layer), None)
            if found is None:
                unknown += [member.name for member in members]
            else:
                scored[group] = found
        if unknown:
            raise PatternError(
                f"the search scored no layers {', '.join(unknown)}: policies carry over to networks whose layers have "
                "the same names; pin the others, or search this network"
            )
        return scored

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the result as JSON, whole or not at all."""
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "budgets": [str(budget) for budget in self.budgets],
            "choices": [
                {**asdict(choice), "precisions": [str(precision) for precision in choice.precisions]}
                for choice in self.choices
            ],
            "costs": json.loads(self.costs.to_json()),
            "history": [asdict(step) for step in self.history],
        }
        write_whole(path, json.dumps(data, indent=1).encode())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "SearchResult":
        """Reads what `save` wrote; raises CheckpointError for anything else."""
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != _FORMAT or data["version"] != _VERSION:
                raise CheckpointError(f"{path} holds {data['format']} version {data['version']}, not a search result")
            return SearchResult(
                budgets=tuple(map(Budget.parse, data["budgets"])),
                choices=tuple(map(_read_choice, data["choices"])),
                costs=CostTable.from_json(json.dumps(data["costs"])),
                history=tuple(map(SearchStep.from_dict, data["history"])),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, SaqError):
                raise
            raise CheckpointError(f"{path} is not a search result: {error!r}") from error


def _read_choice(data: Mapping[str, Any]) -> ScoredChoice:
    precisions = tuple(map(Precision.parse, data["precisions"]))
    return ScoredChoice(data["group"], tuple(data["layers"]), precisions, tuple(map(float, data["scores"])))


def _precisions(scored: Scored) -> dict[str, tuple[Precision, ...]]:
    return {group: choice.precisions for group, choice in scored.items()}


def _scores(costs: CostTable, scored: Scored) -> list[list[float]]:
    return [list(scored[group].scores) if group in scored else [0.0] for group in costs.groups]


def _total_score(scored: Scored, chosen: Mapping[str, int]) -> float:
    return math.fsum(choice.scores[chosen[group]] for group, choice in scored.items())


def _solve(budget: Budgets, costs: CostTable, scored: Scored) -> list[int]:
    """The best allocation: for each group of the cost table an index into its choices."""
    return allocate_under(budget_constraints(budget, costs, _precisions(scored)), _scores(costs, scored))


def _policy(costs: CostTable, scored: Scored, chosen: Sequence[int]) -> Policy:
    layers = {}
    for (group, options), index in zip(costs.choices(_precisions(scored)).items(), chosen, strict=True):
        layers.update({layer.name: layer.effective(options[index]) for layer in costs.groups[group]})
    return Policy({layer.name: layers[layer.name] for layer in costs})
