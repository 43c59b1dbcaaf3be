"""Exact allocation on plain data: one choice a group, the largest total score, every limit kept.

Costs become exact integers: no limit is ever exceeded, one that equals an attainable total is attained.
`saq_fx.knapsack` finds the best allocation and proves it.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from saq_fx.errors import InfeasibleBudgetError, PrecisionError, SaqError
from saq_fx.knapsack import Problem, solve

Table: TypeAlias = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Constraint:
    """A limit on a total: what each choice of each group costs, and the most that a whole allocation may."""

    costs: Table
    limit: float
    name: str = "cost"
    unit: str = ""


def allocate(costs: Table, scores: Table, budget: float) -> list[int]:
    """Choose one index a group: the largest total score whose total cost is at most `budget`.

    Of allocations with equal scores the cheapest is taken, unless the tolerance of `allocate_under` was needed.
    Raises what that raises.
    """
    return allocate_under([Constraint(costs, budget)], scores)


def allocate_under(constraints: Sequence[Constraint], scores: Table) -> list[int]:
    """Choose one index a group: the largest total score that keeps every limit.

    The optimum is proven. Where lists of partial allocations had to be cut on the way (above all: scores proportional
    to costs), an allocation will do that falls short of a bound by at most a billionth of the range of scores, from the
    best choices to the worst, and of the prices of the limits. Where that fails too, after about half a minute, a
    warning says what may be missing.
    A proof by HiGHS, the last resort, holds to its tolerances: also about a billionth.

    Raises PrecisionError, naming the group, for tables that are empty, ragged or not finite, and
    InfeasibleBudgetError, naming the smallest feasible figures, where no allocation keeps all limits; SaqError where
    none was found, and it is not known whether there is one.
    """
    scores = _checked_table("scores", scores)
    checked = [_checked_constraint(constraint, scores) for constraint in constraints]
    if not checked:
        raise PrecisionError("an allocation needs at least one constraint")
    if not_met := [constraint for constraint in checked if constraint.limit < smallest(constraint.costs)]:
        raise InfeasibleBudgetError("; ".join(map(_minimum, not_met)))
    if not scores:
        return []
    solution = solve(_problem(checked, scores))
    minima = "; ".join(map(_minimum, checked))
    if solution is None:
        raise InfeasibleBudgetError(f"each limit can be kept alone, but not all of them together: {minima}")
    if solution.chosen is None:
        raise SaqError(f"found no allocation that keeps all limits together, and no proof that none does: {minima}")
    if solution.missing:
        warnings.warn(f"the allocation is not proven optimal; one may score {solution.missing:.3g} more", stacklevel=2)
    return solution.chosen


def smallest(costs: Table) -> float:
    """The smallest budget that `allocate` can keep: the sum of the groups' minima, never rounded down."""
    total = sum((Fraction(min(group)) for group in costs), Fraction())
    nearest = float(total)
    return nearest if nearest >= total else math.nextafter(nearest, math.inf)


def frontier(costs: Table, scores: Table) -> list[tuple[float, float, list[int]]]:
    """Efficient allocations as (cost, score, choice), from the cheapest one to the one with the best score.

    These are the corners of the linear relaxation: each is the optimum at its own cost, and between two of
    them `allocate` may find others. Raises PrecisionError as `allocate` does.
    """
    scores = _checked_table("scores", scores)
    costs = _checked_constraint(Constraint(costs, 0.0), scores).costs
    hulls = [_hull(*group) for group in zip(costs, scores, strict=True)]
    steps = sorted((-slope, group, index) for group, hull in enumerate(hulls) for slope, index in hull[1:])
    chosen = [hull[0][1] for hull in hulls]
    chosen_costs = [group[index] for group, index in zip(costs, chosen, strict=True)]
    chosen_scores = [group[index] for group, index in zip(scores, chosen, strict=True)]
    points = [(math.fsum(chosen_costs), math.fsum(chosen_scores), chosen.copy())]
    for _, group, index in steps:
        chosen[group] = index
        chosen_costs[group], chosen_scores[group] = costs[group][index], scores[group][index]
        points.append((math.fsum(chosen_costs), math.fsum(chosen_scores), chosen.copy()))
    return points


def _hull(costs: Sequence[float], scores: Sequence[float]) -> list[tuple[float, int]]:
    """The corners of a group's trade-off from its cheapest choice on, as (score gained per cost, index)."""

    def slope(first: int, second: int) -> float:
        return (scores[second] - scores[first]) / (costs[second] - costs[first])

    cheapest, *others = sorted(range(len(costs)), key=lambda index: (costs[index], -scores[index]))
    hull = [(math.inf, cheapest)]
    for index in others:
        if scores[index] > scores[hull[-1][1]]:
            while len(hull) > 1 and slope(hull[-1][1], index) >= hull[-1][0]:
                hull.pop()
            hull.append((slope(hull[-1][1], index), index))
    return hull


def _checked_table(name: str, table: Table) -> list[list[float]]:
    rows = [[float(value) for value in group] for group in table]
    for index, row in enumerate(rows):
        if not row:
            raise PrecisionError(f"{name}: group {index} has no choices; give each group at least one")
        if not all(map(math.isfinite, row)):
            raise PrecisionError(f"{name}: group {index} holds a value that is not finite: {row}")
    return rows


def _checked_constraint(constraint: Constraint, scores: Table) -> Constraint:
    name = constraint.name
    costs = _checked_table(name, constraint.costs)
    if len(costs) != len(scores):
        raise PrecisionError(f"{name}: costs of {len(costs)} groups, but scores of {len(scores)}")
    for index, (row, score_row) in enumerate(zip(costs, scores, strict=True)):
        if len(row) != len(score_row):
            raise PrecisionError(f"{name}: group {index} has {len(row)} costs, but {len(score_row)} scores")
    limit = float(constraint.limit)
    if not math.isfinite(limit):
        raise PrecisionError(f"{name}: the limit should be a finite number, not {limit}")
    return Constraint(costs, limit, name, constraint.unit)


def _minimum(constraint: Constraint) -> str:
    least, limit = (
        f"{value:.0f}" if value.is_integer() and abs(value) < 1e16 else repr(value)
        for value in (smallest(constraint.costs), constraint.limit)
    )
    unit = f" {constraint.unit}" if constraint.unit else ""
    return f"{constraint.name}: the smallest feasible budget is {least}{unit}, the one given is {limit}{unit}"


def _problem(constraints: Sequence[Constraint], scores: list[list[float]]) -> Problem:
    tables, spares = zip(*map(_integers, constraints), strict=True)
    rows = [list(zip(*group, strict=True)) for group in zip(*tables, strict=True)]
    return Problem.reduced(rows, scores, spares)


def _integers(constraint: Constraint) -> tuple[list[list[int]], int]:
    """Costs above their group's least, and what the limit leaves for them, in the largest common unit."""
    ratios = [[cost.as_integer_ratio() for cost in group] for group in constraint.costs]
    # A float is an integer over a power of two, so the largest denominator is common to all.
    scale = max(denominator for group in ratios for _, denominator in group)
    exact = [[numerator * (scale // denominator) for numerator, denominator in group] for group in ratios]
    spare = math.floor(Fraction(constraint.limit) * scale) - sum(map(min, exact))
    above = [[cost - least for cost in group] for group, least in zip(exact, map(min, exact), strict=True)]
    unit = math.gcd(*(cost for group in above for cost in group)) or 1
    table = [[cost // unit for cost in group] for group in above]
    return table, min(spare // unit, sum(map(max, table)))
