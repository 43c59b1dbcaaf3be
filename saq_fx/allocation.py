"""Exact allocation on plain data: one choice a group, the largest total score, every limit kept.

This is the multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, ch. 11).
Costs become exact integers: no limit is ever exceeded, one that equals an attainable total is attained.
The linear relaxation puts prices on costs and so bounds every score. A dynamic program over the allocations
that come close to this bound proves the optimum. The rare instance where too many come close (scores
proportional to costs, or many groups under several limits) is left to the branch and bound of HiGHS.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from saq_fx.errors import InfeasibleBudgetError, PrecisionError, SaqError

Table: TypeAlias = Sequence[Sequence[float]]
Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[Any]  # int64, or Python integers where 64 bits are too few

MAX_STATES = 1_000_000  # partial allocations in one pass of the dynamic program: about half a second
LEVELS = 16  # of a cost, up to which cheaper allocations are looked for
SOLVER_SECONDS = 20.0


@dataclass(frozen=True)
class Constraint:
    """A limit on a total: what each choice of each group costs, and the most that a whole allocation may."""

    costs: Table
    limit: float
    name: str = "cost"
    unit: str = ""


def allocate(costs: Table, scores: Table, budget: float) -> list[int]:
    """Choose one index a group: the largest total score whose total cost is at most `budget`.

    Of allocations with equal scores the cheapest is taken, unless HiGHS was needed.
    Raises what `allocate_under` raises.
    """
    return allocate_under([Constraint(costs, budget)], scores)


def allocate_under(constraints: Sequence[Constraint], scores: Table) -> list[int]:
    """Choose one index a group: the largest total score that keeps every limit.

    Raises PrecisionError, naming the group, for tables that are empty, ragged or not finite, and
    InfeasibleBudgetError, naming the smallest feasible figures, where no allocation keeps all limits.
    Warns if HiGHS was needed and could not prove its answer in SOLVER_SECONDS.
    """
    scores = _checked_table("scores", scores)
    checked = [_checked_constraint(constraint, scores) for constraint in constraints]
    if not checked:
        raise PrecisionError("an allocation needs at least one constraint")
    if not_met := [constraint for constraint in checked if constraint.limit < smallest(constraint.costs)]:
        raise InfeasibleBudgetError("; ".join(map(_minimum, not_met)))
    if not scores:
        return []
    problem = _reduce(checked, scores)
    try:
        chosen = _enumerate(problem)
    except _TooManyStatesError:
        chosen = _branch_and_bound(problem)
    if chosen is None:
        minima = "; ".join(map(_minimum, checked))
        raise InfeasibleBudgetError(f"each limit can be kept alone, but not all of them together: {minima}")
    return chosen


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


class _TooManyStatesError(Exception):
    """The dynamic program would outgrow MAX_STATES."""


@dataclass(frozen=True)
class _Problem:
    """The groups as arrays: costs are integers above the group's least, scores relative to its best."""

    costs: Integers  # [groups, choices, constraints]
    scores: Floats  # [groups, choices]; -inf where a choice is left out
    spare: Integers  # [constraints]: what each limit leaves above the sum of the least costs

    def shares(self, costs: Integers) -> Floats:
        """Costs [..., constraints] as fractions of what is spare."""
        fractions: Floats = (costs / np.maximum(self.spare, 1)).astype(np.float64)
        return fractions


def _reduce(constraints: Sequence[Constraint], scores: Table) -> _Problem:
    """Leave out what costs more than is spare, and what another choice equals or betters in every respect."""
    tables, spares = zip(*map(_integers, constraints), strict=True)
    dtype = np.int64 if max(spares) * (len(scores) + 1) < 2**62 else object
    shape = len(scores), max(map(len, scores))
    costs, relative = np.zeros((*shape, len(spares)), dtype), np.full(shape, -np.inf)
    for group, row in enumerate(scores):
        choices = list(zip(*(table[group] for table in tables), strict=True))
        kept: list[int] = []
        for index in sorted(range(len(row)), key=lambda index: (-row[index], choices[index])):
            beaten = any(_no_more(choices[other], choices[index]) for other in kept)
            if not beaten and _no_more(choices[index], spares):
                kept.append(index)
        for index in kept:
            costs[group, index] = choices[index]
            relative[group, index] = row[index] - row[kept[0]]
    return _Problem(costs, relative, np.array(spares, dtype))


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


def _no_more(costs: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return all(cost <= other for cost, other in zip(costs, others, strict=True))


def _enumerate(problem: _Problem) -> list[int] | None:
    """The optimum by dynamic programming in widening circles; None where no allocation keeps all limits.

    At prices p, an allocation of scores s and costs c falls short of the Lagrangian bound on all scores by
    p (spare - sum c) + sum over groups of [max(s - p c) - (s - p c)]: the least shortfall is the best score.
    """
    if not np.isfinite(problem.scores).any(axis=1).all():
        return None
    prices = _prices(problem)
    values = problem.scores - problem.shares(problem.costs) @ prices
    shortfalls = values.max(axis=1, keepdims=True) - values
    worst = prices.sum() + np.where(np.isfinite(shortfalls), shortfalls, 0.0).max(axis=1).sum()
    for step in range(60, -1, -1):
        chosen = _search(problem, prices, shortfalls, worst * (2 ** (-step / 2) + 1e-12))
        if chosen is not None:
            return chosen
    return None


def _search(problem: _Problem, prices: Floats, shortfalls: Floats, radius: float) -> list[int] | None:
    """The best score, then the least cost, among allocations that fall short by at most `radius`."""
    kept = shortfalls <= radius
    counts = kept.sum(axis=1)
    least = np.where(kept[:, :, None], problem.costs, problem.spare).min(axis=1)
    most = np.where(kept[:, :, None], problem.costs, 0).max(axis=1)
    chosen = shortfalls.argmin(axis=1)
    # Groups with one choice left are settled at once; at least one group stays, to check the total.
    closed, opened = np.split(np.argsort(counts, kind="stable"), [min(sum(counts == 1), len(counts) - 1)])
    used = problem.costs[closed, chosen[closed]].sum(axis=0, keepdims=True)
    score, short, visited, history = np.zeros(1), np.zeros(1), 0, []
    later_least, later_most = least[opened].sum(axis=0), most[opened].sum(axis=0)
    for group in opened:
        later_least, later_most = later_least - least[group], later_most - most[group]
        options = np.flatnonzero(kept[group])
        visited += len(used) * len(options)
        if visited > MAX_STATES:
            raise _TooManyStatesError
        used = (used[:, None] + problem.costs[group, options]).reshape(-1, used.shape[1])
        score = np.add.outer(score, problem.scores[group, options]).ravel()
        short = np.add.outer(short, shortfalls[group, options]).ravel()
        unused = problem.shares(np.maximum(problem.spare - used - later_most, 0))
        alive = (used + later_least <= problem.spare).all(axis=1) & (short + unused @ prices <= radius)
        states = _undominated(used, score, np.flatnonzero(alive))
        if not len(states):
            return None
        history.append((group, options, states))
        used, score, short = used[states], score[states], short[states]
    state = int(score.argmax())
    for group, options, states in reversed(history):
        state, option = divmod(int(states[state]), len(options))
        chosen[group] = options[option]
    return [int(index) for index in chosen]


def _undominated(used: Integers, score: Floats, states: NDArray[np.intp]) -> NDArray[np.intp]:
    """The given states, cheapest first, without those whose score another one reaches at no more cost.

    Under several constraints not every such state is found, for comparing all takes too long: a state is compared with
    the best of all that are cheaper by the first constraint and stay below one of some levels by the others.
    """
    states = states[np.lexsort((-score[states], *used[states].T[::-1]))]
    used, score = used[states], score[states]
    kept = np.ones(len(states), dtype=bool)
    if used.shape[1] == 1:
        kept[1:] = score[1:] > np.maximum.accumulate(score)[:-1]
        return states[kept]
    if not len(states):
        return states
    kept[1:] = (used[1:] < used[:-1]).any(axis=1) | (score[1:] > score[:-1])
    others = used[:, 1:]
    levels = np.sort(others, axis=0)[len(states) * np.arange(1, LEVELS) // LEVELS]
    highest = np.sum([(others >= level).all(axis=1) for level in levels], axis=0) - 1
    for index, level in enumerate(levels):
        best = np.maximum.accumulate(np.where((others <= level).all(axis=1), score, -np.inf))
        above = np.flatnonzero(highest[1:] == index) + 1
        kept[above] &= score[above] > best[above - 1]
    return states[kept]


class _LinearForm(NamedTuple):
    """The problem as a linear program with one variable a choice."""

    where: tuple[NDArray[np.intp], ...]  # each variable's group and choice
    losses: Floats  # [variables]: score below the group's best, in units of `unit`
    unit: float
    groups: Any  # [groups, variables], sparse: 1 where the variable is of the group
    shares: Floats  # [constraints, variables]

    @classmethod
    def of(cls, problem: _Problem) -> Self:
        where = np.nonzero(np.isfinite(problem.scores))
        losses = -problem.scores[where]
        unit = float(losses.max()) or 1.0
        groups = csr_array((np.ones(len(losses)), (where[0], np.arange(len(losses)))))
        return cls(where, losses / unit, unit, groups, problem.shares(problem.costs[where]).T)


def _prices(problem: _Problem) -> Floats:
    """The score that all of each spare cost is worth: the dual of the linear relaxation (HiGHS).

    Any prices give a valid bound: rounding does no harm, and where there is no solution zeros will do.
    """
    form = _LinearForm.of(problem)
    limits, ones = np.ones(len(problem.spare)), np.ones(len(problem.scores))
    solution = linprog(form.losses, A_ub=form.shares, b_ub=limits, A_eq=form.groups, b_eq=ones)
    marginals = np.asarray(solution.ineqlin.marginals if solution.status == 0 else -0.0 * limits)
    return np.maximum(-form.unit * marginals, 0.0)


def _branch_and_bound(problem: _Problem) -> list[int] | None:
    """The optimum by HiGHS, to its tolerances; None where it finds that no allocation keeps all limits.

    Its answer may exceed a limit by one part in a million: the limits are tightened until it keeps them.
    """
    form = _LinearForm.of(problem)
    margin = 0.0
    while True:
        limits = LinearConstraint(form.shares, -np.inf, 1 - margin)
        solution = milp(
            1e3 * form.losses,  # HiGHS stops at an absolute gap of 1e-6: a billionth of the largest loss
            integrality=np.ones(len(form.losses), dtype=int),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(form.groups, 1, 1), limits],
            options={"mip_rel_gap": 0.0, "time_limit": SOLVER_SECONDS},
        )
        if solution.status == 2:
            return None
        if solution.x is None:
            raise SaqError(f"HiGHS found no allocation: {solution.message}")
        variables = np.zeros(problem.scores.shape)
        variables[form.where] = solution.x
        chosen = variables.argmax(axis=1)
        if (problem.costs[np.arange(len(chosen)), chosen].sum(axis=0) <= problem.spare).all():
            break
        margin = max(2 * margin, 1e-9)
    if solution.status != 0:
        gap = (solution.fun - solution.mip_dual_bound) / 1e3 * form.unit
        warnings.warn(f"the allocation is not proven optimal; one may score {gap:.3g} more", stacklevel=3)
    return [int(index) for index in chosen]
