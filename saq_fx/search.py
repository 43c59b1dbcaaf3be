"""Mixed-precision search under a hard budget: one search, scores for every choice, a policy for any budget."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import Progress

from saq_fx.choices import choices
from saq_fx.cost import cost_table
from saq_fx.errors import PrecisionError
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import Batch
from saq_fx.pass_base import Pipeline, check_facts
from saq_fx.passes.relax_precision import CANDIDATES, OPERANDS, RelaxPrecision, searchable_groups
from saq_fx.passes.search_asga import LossFunction, SearchAsga, SearchStep
from saq_fx.precision import Budget
from saq_fx.search_result import Budgets, ScoredChoice, SearchResult

_LOGGER = logging.getLogger(__name__)

Candidates = Sequence[int] | Mapping[str, Any] | RelaxPrecision


def search_precision(
    gm: SaqGraphModule,
    batches: Iterable[Batch],
    loss_fn: LossFunction,
    *,
    budget: Budgets = (),
    candidates: Candidates = CANDIDATES,
    steps: int | None = None,
    after_step: Callable[[SearchStep], None] | None = None,
    **settings: Any,
) -> SearchResult:
    """Searches the bits of every layer that is not pinned by ASGA (arXiv 2505.04877); `gm` is not changed.

    A copy is trained with mixtures over the candidates; see `SearchAsga`. Whether the budget can be kept at all is
    settled before, and the range of budgets that can is logged, and shown on a terminal.

    Args:
        batches: (inputs, targets), inputs as for `example_inputs`; iterated again where `steps` asks for more.
        loss_fn: of outputs and targets, the mean loss.
        budget: one or several; all are kept. None at all where `beta` prices the BitOps: see `SearchAsga`.
        candidates: bits to choose from; or a mapping: those of "weight" and "activation" apart, and those of layers by
            pattern, `{"weight": (2, 4), "op:linear": (4, 6), "layer1.*": {"activation": (8,)}}`; or a
            `RelaxPrecision`, which also says what shares a choice.
        steps: training steps; None for one pass over `batches`.
        after_step: called with what each step saw.
        settings: further options of `SearchAsga`: `beta`, `rho`, `weight_lr`, `logits_lr`, `checkpoint` and others.

    Raises:
        InfeasibleBudgetError: before any training, with the smallest feasible figure.
        PrecisionError: no layer is left to choose for, or the candidates make no sense.
        PatternError: a pattern of the candidates matches no layer that has a choice.
        TrainingError: the batches run out, or a loss is not finite.
    """
    space = SearchSpace(gm, budget, candidates)
    console = Console(stderr=True)
    if console.is_terminal:
        console.print("\n".join(space.feasible))
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Searching bits", total=None)

        def advance(step: SearchStep) -> None:
            progress.update(task, total=search.step_count(), advance=1)
            if after_step is not None:
                after_step(step)

        search = SearchAsga(batches, loss_fn, space.budgets, steps=steps, after_step=advance, **settings)
        found = search.run(space.relaxed)
    return space.result(found.scores, found.history)


class SearchSpace:
    """A relaxed copy of a graph, what can be chosen in it, and budgets that are known to be feasible.

    Arguments and errors are those of `search_precision`.
    """

    def __init__(self, gm: SaqGraphModule, budget: Budgets, candidates: Candidates) -> None:
        check_facts(gm, frozenset({"annotations", "shapes", "quantizers"}), "a search of bits")
        self.budgets = tuple(map(Budget.parse, budget if isinstance(budget, list | tuple) else [budget]))
        if not searchable_groups(gm):
            raise PrecisionError("every layer is pinned: there is nothing to search")
        self.relaxed = copy.deepcopy(gm)
        Pipeline((relaxation(candidates),)).run(self.relaxed)
        self.choices = choices(self.relaxed)
        self.costs = cost_table(gm).regrouped({layer: each.name for each in self.choices for layer in each.layers})
        unscored = self.result([(0.0,) * len(choice.precisions()) for choice in self.choices])
        ranges = zip(self.budgets, unscored.feasible_budgets(), strict=False)
        self.feasible = [f"Budget {each}; feasible are {least} to {most}" for each, (least, most) in ranges]
        _LOGGER.info("; ".join(self.feasible))
        unscored.policy_for(unscored.budgets)

    def result(self, scores: Sequence[tuple[float, ...]], history: tuple[SearchStep, ...] = ()) -> SearchResult:
        """What the scores of every choice make; without a budget, that of the best scores."""
        scored = tuple(
            ScoredChoice(choice.name, choice.layers, tuple(choice.precisions()), of_choice)
            for choice, of_choice in zip(self.choices, scores, strict=True)
        )
        found = SearchResult(self.budgets, scored, self.costs, history)
        return found if self.budgets else replace(found, budgets=(Budget.bitops(found.frontier()[-1].bitops),))


def relaxation(candidates: Candidates) -> RelaxPrecision:
    """Candidates in any of their forms as the pass that makes them."""
    if isinstance(candidates, RelaxPrecision):
        return candidates
    if not isinstance(candidates, Mapping):
        return RelaxPrecision(candidates, candidates)
    overrides = {key: bits for key, bits in candidates.items() if key not in OPERANDS}
    weight, activation = (candidates.get(operand, CANDIDATES) for operand in OPERANDS)
    return RelaxPrecision(weight, activation, overrides)
