"""Mixed-precision search under a hard budget: one search, scores for every choice, a policy for any budget."""

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from saq_fx.allocation import allocate_under, frontier
from saq_fx.cost import CostTable, budget_constraints, cost_table
from saq_fx.errors import CheckpointError, PatternError, PrecisionError, SaqError
from saq_fx.graph import SaqGraphModule
from saq_fx.pass_base import Pipeline, check_facts
from saq_fx.passes.relax_precision import CANDIDATES, RelaxPrecision, choices
from saq_fx.passes.search_asga import Batch, LossFunction, SearchAsga, SearchStep
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

    @property
    def margin(self) -> float:
        """By how much the best precision of this group is better than the second best, in loss."""
        ranked = sorted(self.scores, reverse=True)
        return ranked[0] - ranked[1] if len(ranked) > 1 else 0.0


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
        costs = self.costs if costs is None else costs
        scored = self._scored_groups(costs)
        candidates = {group: choice.precisions for group, choice in scored.items()}
        constraints = budget_constraints(budget, costs, candidates)
        chosen = allocate_under(constraints, self._scores(costs, scored))
        return _policy(costs, candidates, chosen)

    def frontier(self, costs: CostTable | None = None) -> list[FrontierPoint]:
        """The efficient policies between the cheapest and the best, by total BitOps (upper convex hull)."""
        costs = self.costs if costs is None else costs
        scored = self._scored_groups(costs)
        candidates = {group: choice.precisions for group, choice in scored.items()}
        bitops = [
            [float(sum(layer.bitops(precision) for layer in costs.groups[group])) for precision in precisions]
            for group, precisions in costs.choices(candidates).items()
        ]
        corners = frontier(bitops, self._scores(costs, scored))
        return [FrontierPoint(cost, score, _policy(costs, candidates, chosen)) for cost, score, chosen in corners]

    @property
    def margins(self) -> dict[str, float]:
        """Layer -> how sure its choice is: the score between its best and its second best precision."""
        return {layer: choice.margin for choice in self.choices for layer in choice.layers}

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

    @staticmethod
    def _scores(costs: CostTable, scored: Mapping[str, ScoredChoice]) -> list[list[float]]:
        return [list(scored[group].scores) if group in scored else [0.0] for group in costs.groups]

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
            if data["format"] != _FORMAT or data["version"] > _VERSION:
                raise CheckpointError(f"{path} holds {data['format']} version {data['version']}, not a search result")
            return SearchResult(
                budgets=tuple(map(Budget.parse, data["budgets"])),
                choices=tuple(map(_read_choice, data["choices"])),
                costs=CostTable.from_json(json.dumps(data["costs"])),
                history=tuple(SearchStep(**step) for step in data["history"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, SaqError):
                raise
            raise CheckpointError(f"{path} is not a search result: {error!r}") from error


def _read_choice(data: Mapping[str, Any]) -> ScoredChoice:
    precisions = tuple(map(Precision.parse, data["precisions"]))
    return ScoredChoice(data["group"], tuple(data["layers"]), precisions, tuple(map(float, data["scores"])))


def _policy(costs: CostTable, candidates: Mapping[str, Sequence[Precision]], chosen: Sequence[int]) -> Policy:
    layers = {}
    for (group, options), index in zip(costs.choices(candidates).items(), chosen, strict=True):
        layers.update({layer.name: layer.effective(options[index]) for layer in costs.groups[group]})
    return Policy({layer.name: layers[layer.name] for layer in costs})


def search_precision(
    gm: SaqGraphModule,
    batches: Iterable[Batch],
    loss_fn: LossFunction,
    *,
    budget: Budgets,
    candidates: Sequence[int] | Mapping[str, Sequence[int]] = CANDIDATES,
    steps: int | None = None,
    rho: float = 0.1,
) -> SearchResult:
    """Searches the bits of every layer that is not pinned by ASGA (arXiv 2505.04877); `gm` is not changed.

    A copy is trained with mixtures over the candidates; see `SearchAsga`. Whether the budget can be kept at all is
    settled before.

    Args:
        batches: (inputs, targets), inputs as for `example_inputs`; iterated again where `steps` asks for more.
        loss_fn: of outputs and targets, the mean loss.
        budget: one or several; all are kept.
        candidates: bits to choose from; or those of "weight" and "activation" apart.
        steps: training steps; None for one pass over `batches`.
        rho: first radius of the perturbation; 0 searches without it (EdMIPS).

    Raises:
        InfeasibleBudgetError: before any training, with the smallest feasible figure.
        PrecisionError: no layer is left to choose for, or the candidates make no sense.
        TrainingError: the batches run out, or a loss is not finite.
    """
    check_facts(gm, frozenset({"annotations", "shapes", "quantizers"}), "search_precision")
    budgets = tuple(map(Budget.parse, [budget] if isinstance(budget, Budget | str) else budget))
    relaxed = copy.deepcopy(gm)
    Pipeline((_relaxation(candidates),)).run(relaxed)
    free = choices(relaxed)
    if not free:
        raise PrecisionError("every layer is pinned: there is nothing to search")
    costs = cost_table(gm)
    constraints = budget_constraints(budgets, costs, {choice.name: choice.precisions() for choice in free})
    allocate_under(constraints, [[0.0] * len(row) for row in constraints[0].costs])

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Searching bits", total=None)
        search = SearchAsga(
            batches, loss_fn, budgets, steps=steps, rho=rho, after_step=lambda _: progress.advance(task)
        )
        progress.update(task, total=search.step_count())
        found = search.run(relaxed)
    scored = tuple(
        ScoredChoice(choice.name, choice.layers, tuple(choice.precisions()), scores)
        for choice, scores in zip(free, found.scores, strict=True)
    )
    return SearchResult(budgets, scored, costs, found.history)


def _relaxation(candidates: Sequence[int] | Mapping[str, Sequence[int]]) -> RelaxPrecision:
    if not isinstance(candidates, Mapping):
        return RelaxPrecision(tuple(candidates), tuple(candidates))
    unknown = set(candidates) - {"weight", "activation"}
    if unknown:
        raise PrecisionError(f"candidates of {', '.join(sorted(unknown))}: give those of 'weight' and 'activation'")
    return RelaxPrecision(tuple(candidates.get("weight", CANDIDATES)), tuple(candidates.get("activation", CANDIDATES)))
