"""What a search has to beat, in the same form: sensitivity, uniform and random policies."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from saq_fx.errors import TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import Batch, split_batch, split_inputs
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.passes.relax_precision import CANDIDATES
from saq_fx.passes.search_asga import LossFunction
from saq_fx.search import Candidates, SearchSpace, relaxation
from saq_fx.search_result import Budgets, SearchResult
from saq_fx.shapes import evaluating

_USED = 0.95  # of a budget: more bits than that are left to chance


def measure_sensitivity(
    gm: SaqGraphModule,
    batches: Iterable[Batch],
    loss_fn: LossFunction,
    *,
    budget: Budgets,
    candidates: Candidates = CANDIDATES,
) -> SearchResult:
    """Scores every width of every operand by the loss that it alone costs, without training: a baseline.

    All others have their widest candidate meanwhile. Arguments and errors are those of `search_precision`; the
    batches are iterated once for each candidate of each operand.
    """
    space = SearchSpace(gm, budget, candidates)
    batches = list(map(split_batch, batches))
    if not batches:
        raise TrainingError("sensitivity is measured on batches, and there are none: pass at least one")

    def loss() -> Tensor:
        losses = []
        for inputs, targets in batches:
            args, kwargs = split_inputs(inputs)
            losses.append(loss_fn(space.relaxed(*args, **kwargs), targets))
        return torch.stack(losses).mean()

    with evaluating(space.relaxed):
        mixtures = [mixture for choice in space.choices for mixture in choice.mixtures]
        for mixture in mixtures:
            _select(mixture, max(mixture.candidates))
        widest, gains = loss(), {}
        for mixture in mixtures:
            of_width = []
            for bits in mixture.candidates:
                _select(mixture, bits)
                of_width.append(widest - loss())
            _select(mixture, max(mixture.candidates))
            gains[mixture] = torch.stack(of_width)
    scores = [choice.over_pairs(torch.add, [gains[each] for each in choice.mixtures]) for choice in space.choices]
    return space.result([tuple(each.tolist()) for each in scores])


def _select(mixture: MixtureQuantizer, bits: int) -> None:
    """Leaves one candidate in the mixture, and in all that share its logits."""
    position = mixture.candidates.index(bits)
    mixture.logits.fill_(-math.inf)[position] = 0.0


def best_uniform(gm: SaqGraphModule, *, budget: Budgets, candidates: Candidates = CANDIDATES) -> SearchResult:
    """Scores the pairs of bits that all layers have alike by their BitOps: the budget is used as far as it goes.

    Arguments and errors are those of `search_precision`.
    """
    space = SearchSpace(gm, budget, replace(relaxation(candidates), same_bits=("*",)))
    return space.result([tuple(float(p.weight * p.activation) for p in each.precisions()) for each in space.choices])


def draw_random(
    gm: SaqGraphModule, *, budget: Budgets, candidates: Candidates = CANDIDATES, seed: int = 0
) -> SearchResult:
    """Scores every choice at random, wide precisions higher where the policy would leave the budget unused.

    Arguments and errors are those of `search_precision`.
    """
    space, rng = SearchSpace(gm, budget, candidates), np.random.default_rng(seed)
    widths = [np.array([p.weight * p.activation for p in each.precisions()]) for each in space.choices]
    drawn = [rng.normal(size=len(each)) for each in widths]
    for preference in (0.0, *np.geomspace(0.5, 128, 9)):
        scores = (noise + preference * width / width.max() for noise, width in zip(drawn, widths, strict=True))
        result = space.result([tuple(each.tolist()) for each in scores])
        if result.budget_used >= _USED:
            break
    return result
