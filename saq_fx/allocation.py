"""Exact allocation on plain data: one choice a group, the largest total score, every limit kept.

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11).
Costs are compared as exact integers, so a limit that equals an attainable cost is attained and none is ever
exceeded. A dynamic program proves the optimum, up to the rounding of a sum of scores: the multipliers of the linear
relaxation say how much score each choice gives away, and only what gives away little is enumerated. The rare
instance that is still too large (score proportional to cost, say) goes to HiGHS.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array

from saq_fx.errors import InfeasibleBudgetError, PrecisionError

Table: TypeAlias = Sequence[Sequence[float]]
Floats: TypeAlias = NDArray[np.float64]

# Partial assignments to visit in one pass of the dynamic program, about half a second, before HiGHS is asked.
MAX_STATES = 2_000_000
SOLVER_SECONDS = 60.0


@dataclass(frozen=True)
class Constraint:
    """A limit on a total: the cost of each choice of each group, and the most that the chosen ones may add up to."""

    costs: Table
    limit: float
    name: str = "cost"
    unit: str = ""


def allocate(costs: Table, scores: Table, budget: float) -> list[int]:
    """Choose one index a group for the largest total score at a total cost of at most `budget`.

    Of allocations with equal scores the cheapest is taken. Raises what `allocate_under` raises.
    """
    return allocate_under([Constraint(costs, budget)], scores)


def allocate_under(constraints: Sequence[Constraint], scores: Table) -> list[int]:
    """Choose one index a group for the largest total score under every constraint.

    Raises PrecisionError, naming the group, for tables that are empty, ragged or not finite, and
    InfeasibleBudgetError, naming the smallest feasible figures, where no choice keeps every limit.
    """
    scores = _checked_table("scores", scores)
    columns = []
    for constraint in constraints:
        costs = _checked_table(constraint.name, constraint.costs)
        _check_same_shape(constraint.name, costs, scores)
        columns.append(Constraint(costs, _checked_limit(constraint), constraint.name, constraint.unit))
    _check_feasible(columns)
    problem = _Problem.reduce(columns, scores)
    chosen = _enumerate(problem) if problem.feasible else None
    if chosen is None:
        raise InfeasibleBudgetError(
            "no allocation keeps all limits together, although each alone can be kept: "
            + "; ".join(_describe(column) for column in columns)
        )
    return [int(choices[index]) for choices, index in zip(problem.choices, chosen, strict=True)]


def smallest(costs: Table) -> float:
    """The least total cost that one choice a group can have: the smallest limit that `allocate` accepts."""
    total = math.fsum(min(group) for group in costs)
    exact = sum(_units(min(group)) for group in costs)
    return total
