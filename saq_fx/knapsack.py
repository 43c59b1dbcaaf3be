"""The multiple-choice knapsack with several constraints, on integer costs: the best allocation and its proof.

Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, ch. 11. The linear relaxation (HiGHS) puts prices on costs: the
Lagrangian bound on all scores. A choice's reduced cost says how far every allocation that makes it falls short of this
bound, so that only few choices, the core, are left within a small radius. Short lists find a good allocation, longer
ones then prove that its radius holds no better one.
"""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array, hstack

from saq_fx.knapsack_core import Floats, Found, Indices, Integers, Relaxed, Work, WorkSpentError
from saq_fx.knapsack_search import search

Row: TypeAlias = list[tuple[int, ...]]  # of each choice of a group: its cost by each constraint

TOLERANCE = 1e-9  # of the range of scores, where the exact search would outgrow its lists
SHORT, LONGER, LONGEST = 1 << 8, 8, 1 << 20  # partial allocations in a list: at first, how many times more, at most
NEIGHBOURHOODS, FREE, ALL = 8, 8, 1 << 15  # searches around an allocation: groups, and partial allocations in a list
WIDER, BLIND = 2.0, 2.0  # a radius by one that is proven to hold nothing, and by one where nothing was found
TURNS = ((3_000_000, 3.0), (12_000_000, 5.0), (36_000_000, 15.0))
"""Partial allocations that each turn of the enumeration may look at, and seconds of HiGHS after it."""
PATIENCE, FEW = 4, 2  # how many times more with few constraints, under which HiGHS is seldom the faster one


class Solution(NamedTuple):
    """One choice a group, and by how much at most another allocation may score more: 0 where proven optimal."""

    chosen: list[int] | None  # None: no allocation was found
    missing: float


@dataclass(frozen=True)
class Problem:
    """The groups as arrays: costs are integers above the group's least, scores relative to its best."""

    costs: Integers  # [groups, choices, constraints]
    scores: Floats  # [groups, choices]; -inf where a choice is left out
    spare: Integers  # [constraints]: what each limit leaves above the sum of the least costs

    @classmethod
    def reduced(cls, rows: list[Row], scores: list[list[float]], spare: tuple[int, ...]) -> Self:
        """Leave out what costs more than is spare, and what another choice equals or betters in every respect."""
        dtype = np.int64 if max(spare) * (len(scores) + 1) < 2**62 else object
        shape = len(scores), max(map(len, scores))
        costs, relative = np.zeros((*shape, len(spare)), dtype), np.full(shape, -np.inf)
        for group, (row, choices) in enumerate(zip(scores, rows, strict=True)):
            kept: list[int] = []
            for index in sorted(range(len(row)), key=lambda index: (-row[index], choices[index])):
                beaten = any(_no_more(choices[other], choices[index]) for other in kept)
                if not beaten and _no_more(choices[index], spare):
                    kept.append(index)
            for index in kept:
                costs[group, index] = choices[index]
                relative[group, index] = row[index] - row[kept[0]]
        return cls(costs, relative, np.array(spare, dtype))


def _no_more(costs: tuple[int, ...], others: tuple[int, ...]) -> bool:
    return all(cost <= other for cost, other in zip(costs, others, strict=True))


def solve(problem: Problem) -> Solution | None:
    """The best score, and under one constraint the least cost for it; None where no allocation keeps all limits."""
    relaxed = _relax(problem) if np.isfinite(problem.scores).any(axis=1).all() else None
    if relaxed is None:
        return None
    proof, form = _Proof(relaxed), _LinearForm.of(problem)
    for most, seconds in TURNS:
        proof.enumerate(most * PATIENCE if len(problem.spare) <= FEW else most)
        proof.branch_and_bound(form, seconds)
    if proof.best is None:
        return None if proof.done else Solution(None, np.inf)
    missing = 0.0 if proof.done else proof.best.gap - proof.excluded
    return Solution([int(index) for index in proof.best.chosen], missing)


class _Proof:
    """What is known of the least gap: that of the best allocation found, and a gap below which there is none."""

    def __init__(self, relaxed: Relaxed) -> None:
        self.relaxed, self.work = relaxed, Work(0)
        self.best: Found | None = None
        self.excluded, self.searched = 0.0, 0.0  # a radius that holds nothing, and one where nothing was found
        self.is_bounded = False  # whether bounds have left out enough for a list to end
        self.states, self.by_cost = SHORT, True
        self.generator = np.random.default_rng(0)
        self.tolerance = 0.0  # raised where the exact search would be long
        losses = np.where(np.isfinite(relaxed.shortfalls), relaxed.shortfalls, 0.0)
        self.range = float(losses.max(axis=1).sum() + relaxed.prices.sum())
        positive = np.sort(losses[losses > TOLERANCE * self.range])  # less may be rounding by HiGHS
        self.start = float(positive[:20].max(initial=TOLERANCE * self.range))

    @property
    def done(self) -> bool:
        """Whether the best allocation is proven optimal, or proven not to exist."""
        if self.best is None:
            return self.excluded > self.range
        return self.best.gap - self.excluded <= max(self.tolerance, self.relaxed.rounding)

    def enumerate(self, most: int) -> None:
        """Search the core in several radii, with ever longer lists, until the proof is done or the work is spent."""
        self.work.left = most
        try:
            while not self.done and self.states <= LONGEST:
                self._search(self._radius())
        except WorkSpentError:
            self.tolerance = TOLERANCE * self.range

    def _radius(self) -> float:
        """What to search next: halfway to the best allocation, unless it is near, for it may be a bad one."""
        if self.best is None:
            return max(self.start, WIDER * self.excluded, BLIND * self.searched)
        if 0 < WIDER * self.excluded < self.best.gap:
            return math.sqrt(self.excluded * self.best.gap)
        return self.best.gap

    def _search(self, radius: float) -> None:
        """Search one radius; where lists are cut, widen it until something is found, and lengthen them from then on."""
        found, complete = search(self.relaxed, radius, self.states, self.work, by_cost=self.by_cost)
        if found is not None and (self.best is None or found.gap < self.best.gap or complete):
            self.best = found
        if complete:
            self.excluded, self.is_bounded = max(self.excluded, radius if found is None else found.gap), True
            return
        self.tolerance = TOLERANCE * self.range
        if not self.is_bounded:
            self._search_around()
        if self.best is None and radius <= self.range:
            self.searched = radius
            return
        # Neither order is the better one everywhere, and which it is cannot be told beforehand.
        self.states *= LONGER if self.by_cost else 1
        self.by_cost = not self.by_cost

    def _search_around(self) -> None:
        """Search few groups at a time, while all others keep their choices: where all choices are about as good.

        Then bounds leave out nothing, but there are good allocations everywhere.
        """
        relaxed = self.relaxed
        for _ in range(NEIGHBOURHOODS):
            if self.done:
                return
            chosen = relaxed.nominal if self.best is None else self.best.chosen
            free = np.union1d(self.generator.permutation(len(chosen))[:FREE], np.flatnonzero(relaxed.divided))
            around = relaxed.around(chosen, free)
            radius = (self.range if self.best is None else self.best.gap) - (relaxed.bound - around.bound)
            found, _ = search(around, radius, ALL, self.work)
            gap = None if found is None else relaxed.gap(found.chosen)
            if found is not None and gap is not None and (self.best is None or gap < self.best.gap - relaxed.rounding):
                self.best = Found(gap, found.chosen)

    def branch_and_bound(self, form: "_LinearForm", seconds: float) -> None:
        """Leave the core to HiGHS, if there is more to prove.

        Its answer may exceed a limit by one part in a million, so that it is asked again under tighter ones. These may
        have no solution where the true ones have: only its bound under the true limits counts as a proof.
        """
        if self.done or not seconds:
            return
        relaxed, end = self.relaxed, time.monotonic() + seconds
        core = relaxed.shortfalls[form.where] <= (np.inf if self.best is None else self.best.gap + relaxed.rounding)
        for margin in (0.0, 1e-9, 1e-8, 1e-7, 1e-6):
            parts, least_loss, proven = form.solve(core, 1 - margin, end - time.monotonic())
            if margin == 0.0:
                self.excluded = max(self.excluded, least_loss + relaxed.bound)
                self.tolerance = TOLERANCE * self.range if proven else self.tolerance
            if parts is None:
                return
            table = np.full(relaxed.shortfalls.shape, -1.0)
            table[form.where[0][core], form.where[1][core]] = parts
            chosen = table.argmax(axis=1)
            gap = relaxed.gap(chosen)
            if gap is not None:
                self.best = min(self.best or Found(gap, chosen), Found(gap, chosen), key=lambda found: found.gap)
                return


class _LinearForm(NamedTuple):
    """The problem as a linear program with one variable a choice."""

    where: tuple[Indices, ...]  # each variable's group and choice
    losses: Floats  # [variables]: score below the group's best, in units of `unit`
    unit: float
    groups: Any  # [groups, variables], sparse: 1 where the variable is of the group
    shares: Floats  # [constraints, variables]: costs as fractions of what is spare

    @classmethod
    def of(cls, problem: Problem) -> Self:
        where = np.nonzero(np.isfinite(problem.scores))
        losses = -problem.scores[where]
        unit = float(losses.max()) or 1.0
        groups = csr_array((np.ones(len(losses)), (where[0], np.arange(len(losses)))))
        shares = (problem.costs[where] / np.maximum(problem.spare, 1)).astype(np.float64).T
        return cls(where, losses / unit, unit, groups, shares)

    def solve(self, core: NDArray[np.bool_], limit: float, seconds: float) -> tuple[Floats | None, float, bool]:
        """Branch and bound over some variables: how much of each choice, a bound on all losses, and if it ended."""
        with _silent_output():
            solution = milp(
                1e3 * self.losses[core],  # HiGHS stops at an absolute gap of 1e-6: a billionth of the largest loss
                integrality=np.ones(core.sum()),
                bounds=Bounds(0, 1),
                constraints=[
                    LinearConstraint(self.groups[:, core], 1, 1),
                    LinearConstraint(self.shares[:, core], -np.inf, limit),
                ],
                options={"mip_rel_gap": 0.0, "time_limit": max(seconds, 0.01)},
            )
        bound = -np.inf if solution.mip_dual_bound is None else solution.mip_dual_bound / 1e3 * self.unit
        return solution.x, bound, solution.status == 0


@contextmanager
def _silent_output() -> Iterator[None]:
    """HiGHS prints some lines past its own switch, from C: only the descriptor of the process keeps them back."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _relax(problem: Problem) -> Relaxed | None:
    """Price the costs by the dual of the linear relaxation; None where not even that has a solution.

    Any prices give a valid bound: rounding does no harm, and where HiGHS finds no solution zeros will do.
    """
    form = _LinearForm.of(problem)
    limits, ones = np.ones(len(problem.spare)), np.ones(len(problem.scores))
    solution = linprog(form.losses, A_ub=form.shares, b_ub=limits, A_eq=form.groups, b_eq=ones)
    if solution.status == 2 and _cannot_keep(form):
        return None
    prices, parts = 0.0 * limits, np.isfinite(problem.scores).astype(np.float64)
    if solution.status == 0:
        prices = np.maximum(-form.unit * np.asarray(solution.ineqlin.marginals), 0.0)
        parts[form.where] = solution.x
    values = problem.scores.copy()
    values[form.where] -= prices @ form.shares
    shortfalls = values.max(axis=1, keepdims=True) - values
    nominal, divided = parts.argmax(axis=1), parts.max(axis=1) < 1 - 1e-6
    bound = float(values.max(axis=1).sum() + prices.sum())
    return Relaxed(problem.costs, problem.spare, prices, bound, shortfalls, nominal, divided)


def _cannot_keep(form: _LinearForm) -> bool:
    """Whether weights on the constraints prove that no allocation keeps all: the least weighted total is too much."""
    excess = csr_array(np.full((len(form.shares), 1), -1.0))
    choices: Any = hstack([form.groups, csr_array((form.groups.shape[0], 1))])
    limits, ones = np.ones(len(form.shares)), np.ones(form.groups.shape[0])
    objective = np.append(np.zeros(len(form.losses)), 1.0)
    totals: Any = hstack([csr_array(form.shares), excess])
    solution = linprog(objective, A_ub=totals, b_ub=limits, A_eq=choices, b_eq=ones)
    if solution.status != 0:
        return False
    weights = np.maximum(-np.asarray(solution.ineqlin.marginals), 0.0)
    least = np.full(form.groups.shape[0], np.inf)
    np.minimum.at(least, form.where[0], weights @ form.shares)
    return bool(least.sum() > weights.sum() * (1 + 1e-9))
