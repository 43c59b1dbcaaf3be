"""The core of a multiple-choice knapsack, and Lagrangian bounds on what partial allocations of it can come to.

The prices that give good bounds are sought by subgradients: Polyak, Minimization of unsmooth functionals, 1969.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Integers: TypeAlias = NDArray[Any]  # int64, or Python integers where 64 bits are too few

SAMPLE, STEPS = 24, 10  # partial allocations for which prices are sought, and steps that improve each
BEYOND = 1.02  # what the steps aim at, by the radius
LEAST_SCALE, LOWEST = 1e-3, -8.0  # of steps, by the highest price; of the change of a price, by its scale
BLOCK = 1 << 12  # partial allocations whose bounds are computed together


class WorkSpentError(Exception):
    """The search has looked at as many partial allocations as it may."""


@dataclass
class Work:
    """What the search may still look at: counted, not timed, so that every run gives the same answer."""

    left: int

    def spend(self, amount: int) -> None:
        """Count partial allocations or pairs of them."""
        self.left -= amount
        if self.left < 0:
            raise WorkSpentError


@dataclass(frozen=True)
class Relaxed:
    """A multiple-choice knapsack with the prices of a Lagrangian relaxation.

    An allocation of costs c falls short of the Lagrangian bound on all scores by the sum of its choices' shortfalls
    (reduced costs) and prices (spare - c): the least such gap is the best score.
    """

    costs: Integers  # [groups, choices, constraints]
    spare: Integers  # [constraints]: what the costs may sum to
    prices: Floats  # [constraints]: score that all of each spare cost is worth
    bound: float  # of all scores
    shortfalls: Floats  # [groups, choices]: inf where a choice is left out
    nominal: Indices  # [groups]: the choice that the relaxation makes, most of it where it divides a group
    divided: NDArray[np.bool_]  # [groups]: whether the relaxation divides it among choices

    @cached_property
    def rounding(self) -> float:
        """What the sums of scores may be wrong by: gaps that differ less are equal."""
        losses = np.where(np.isfinite(self.shortfalls), self.shortfalls, 0.0)
        return float(1e-13 * (losses.max(axis=1).sum() + self.prices.sum())) or 1e-300

    def shares(self, costs: Integers) -> Floats:
        """Costs [constraints, ...] as fractions of what is spare."""
        spare = np.maximum(self.spare, 1).reshape(-1, *[1] * (costs.ndim - 1))
        fractions: Floats = (costs / spare).astype(np.float64, copy=False)
        return fractions

    def worth(self, costs: Integers) -> Floats:
        """The score that costs [constraints, states] are worth."""
        return self.prices @ self.shares(costs)

    def around(self, chosen: Indices, free: Indices) -> "Relaxed":
        """The problem whose groups keep their choices but for the free ones; what they fall short is in the bound."""
        fixed = np.setdiff1d(np.arange(len(chosen)), free)
        shortfalls = np.full_like(self.shortfalls, np.inf)
        shortfalls[free] = self.shortfalls[free]
        shortfalls[fixed, chosen[fixed]] = 0.0
        bound = self.bound - float(self.shortfalls[fixed, chosen[fixed]].sum())
        return replace(self, bound=bound, shortfalls=shortfalls)

    def gap(self, chosen: Indices) -> float | None:
        """By how much an allocation falls short of the bound; None where it exceeds a limit."""
        groups = np.arange(len(chosen))
        unused = self.spare - self.costs[groups, chosen].sum(axis=0)
        if (unused < 0).any():
            return None
        return float(self.shortfalls[groups, chosen].sum() + self.worth(unused))


class Found(NamedTuple):
    """An allocation, and by how much it falls short of the bound."""

    gap: float
    chosen: Indices


@dataclass(frozen=True)
class Core:
    """The choices within a radius of those groups that have more than one, in the order of the search.

    Either those whose choices differ most in cost come first: what is decided last then changes little, so that the
    bounds of the relaxation are near to what partial allocations come to. Or those whose second choices are worst:
    lists are then short until the last groups, which is better where layers of any size may be as good as each other.
    """

    relaxed: Relaxed
    radius: float
    groups: Indices
    choices: Indices  # [groups, choices]: those that fall short least first
    shortfalls: Floats  # [groups, choices]: inf after a group's last
    costs: Integers  # [constraints, groups, choices]
    shares: Floats  # the same as fractions of what is spare
    room: Integers  # [constraints]: what the other groups leave

    @classmethod
    def of(cls, relaxed: Relaxed, radius: float, *, by_cost: bool) -> Self:
        """Sort the groups by what their choices within the radius differ in worth, or by their second choices."""
        kept = relaxed.shortfalls <= radius
        count = kept.sum(axis=1)
        opened, closed = np.flatnonzero(count > 1), np.flatnonzero(count <= 1)
        if by_cost:
            worth = np.tensordot(relaxed.shares(np.moveaxis(relaxed.costs[opened], -1, 0)), relaxed.prices, (0, 0))
            most = np.where(kept[opened], worth, -np.inf).max(axis=1)
            weight = most - np.where(kept[opened], worth, np.inf).min(axis=1)
        else:
            weight = np.partition(relaxed.shortfalls[opened], 1, axis=1)[:, 1] if len(opened) else np.zeros(0)
        opened = opened[np.argsort(-weight, kind="stable")]
        choices = np.argsort(relaxed.shortfalls[opened], axis=1, kind="stable")[:, : count.max(initial=1)]
        shortfalls = np.take_along_axis(relaxed.shortfalls[opened], choices, axis=1)
        shortfalls[shortfalls > radius] = np.inf
        costs = np.moveaxis(relaxed.costs[opened[:, None], choices], -1, 0)
        used = relaxed.costs[closed, relaxed.shortfalls[closed].argmin(axis=1)].sum(axis=0)
        room = relaxed.spare - used
        return cls(relaxed, radius, opened, choices, shortfalls, costs, relaxed.shares(costs), room)

    @property
    def reach(self) -> float:
        """The radius, and some rounding of the bounds."""
        return self.radius + 10 * self.relaxed.rounding

    def left(self, used: Integers) -> Floats:
        """The shares of the limits that partial allocations leave."""
        return self.relaxed.shares(self.room[:, None] - used)


class Bounds(NamedTuple):
    """Other prices than those of the relaxation, each of which bounds what a partial allocation may come to.

    Let a partial allocation fall short by s and leave shares t of the limits. Prices lower by d (at most the prices
    themselves, so that unused shares are not worth less than nothing) say that all that begins with it falls short by
    at least s + d t, plus the least (shortfall - d share) of each group still open. The prices of the relaxation,
    d = 0, are the best ones for all groups, but not for those left where much or little of a limit has been used.
    """

    lower: Floats  # [prices, constraints]
    least: Floats  # [prices, groups]

    @classmethod
    def of(cls, core: Core, lower: Floats) -> Self:
        """The bounds by given prices."""
        return cls(lower, (core.shortfalls - np.tensordot(lower, core.shares, 1)).min(axis=2))

    def best(self, left: Floats, short: Floats, outside: NDArray[np.bool_]) -> tuple[Floats, Indices]:
        """The largest bound on each partial allocation, and the place of the prices that give it."""
        bound, place = np.empty(len(short)), np.empty(len(short), dtype=np.intp)
        rest = self.least[:, outside].sum(axis=1, keepdims=True)
        for start in range(0, len(short), BLOCK):
            part = slice(start, start + BLOCK)
            bounds = self.lower @ left[:, part] + rest
            place[part] = bounds.argmax(axis=0)
            bound[part] = bounds.max(axis=0) + short[part]
        return bound, place

    def improved(self, core: Core, left: Floats, short: Floats, outside: NDArray[np.bool_]) -> Self:
        """Prices that are better for a sample of partial allocations, by subgradient steps from the best ones known.

        The steps are Polyak's, toward bounds just beyond the radius, which leave a partial allocation out.
        """
        sample = np.linspace(0, len(short), min(len(short), SAMPLE), endpoint=False, dtype=np.intp)
        left, short = left[:, sample], short[sample]
        bound, place = self.best(left, short, outside)
        lower = self.lower[place].T  # [constraints, sample]
        best, prices = lower.copy(), core.relaxed.prices[:, None]
        scale = np.maximum(prices, LEAST_SCALE * prices.max())
        shortfalls, shares = core.shortfalls[outside].T[:, None], core.shares[:, outside].swapaxes(1, 2)
        for _ in range(STEPS):
            values = shortfalls - np.tensordot(lower.T, shares, 1).swapaxes(0, 1)  # [choices, sample, groups]
            picks = values.argmin(axis=0)
            value = short + (lower * left).sum(axis=0) + values.min(axis=0).sum(axis=1)
            better = value > bound
            best[:, better], bound[better] = lower[:, better], value[better]
            slope = (left - shares[:, picks, np.arange(picks.shape[1])].sum(axis=2)) * scale
            steps = np.maximum(BEYOND * core.radius - value, 0.0) / np.maximum((slope**2).sum(axis=0), 1e-300)
            lower = np.clip(lower + steps * slope * scale, LOWEST * scale, prices)
        return self.of(core, np.unique(np.concatenate([self.lower[:1], best.T]), axis=0))
