"""Search of a multiple-choice knapsack's core: the allocations that fall short of a bound by at most a radius.

The groups still open are split in two halves. The partial allocations of each half are listed, without those that
another one dominates, and two that fit together are sought over a tree of boxes (meet in the middle: Horowitz and
Sahni, Computing partitions with applications to the knapsack problem, 1974).
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Indices: TypeAlias = NDArray[np.intp]
Integers: TypeAlias = NDArray[Any]  # int64, or Python integers where 64 bits are too few

LEVELS = 8  # of a cost, up to which cheaper partial allocations are looked for
FANOUT = 8  # boxes within a box
CHUNK = 1 << 17  # pairs looked at together
TILTS, SAMPLE, BEST = 512, 128, 16  # other prices, how many states they are tried on, how many prices on all
FEW = 512  # states for which they are not worth it


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
    nominal: Indices  # [groups]: the choice of a group that is not searched
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
        return replace(self, bound=bound, shortfalls=shortfalls, nominal=chosen)

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


class Search(NamedTuple):
    """What one search of the core gave; `complete` if it left out no allocation within its radius."""

    found: Found | None
    complete: bool


@dataclass
class _Half:
    """Partial allocations over some groups, those that fall short least first."""

    used: Integers  # [constraints, states]
    short: Floats  # [states]
    least: Integers  # [constraints]: what all groups outside use at least
    rest: Floats  # [tilts]: what they fall short at least, by each
    steps: list[tuple[int, Indices, Indices]] = field(default_factory=list)  # group, each state's parent and choice
    compare_at: int = 2  # states from which on dominated ones are left out

    def settle(self, relaxed: Relaxed, groups: Indices) -> None:
        """Make the nominal choices of some groups."""
        choices = relaxed.nominal[groups]
        self.used = self.used + relaxed.costs[groups, choices].sum(axis=0)[:, None]
        self.short = self.short + relaxed.shortfalls[groups, choices].sum()

    def write(self, state: int, chosen: Indices) -> None:
        """Write the choices that led to a state."""
        for group, parents, choices in reversed(self.steps):
            chosen[group], state = choices[state], int(parents[state])


def search(relaxed: Relaxed, radius: float, most_states: int, work: Work, *, whole: bool) -> Search:
    """The allocation that falls short least, among those within the radius.

    A list that would outgrow `most_states` ends a `whole` search. Another search then makes the nominal choices of the
    groups left; it begins with the groups that have the best second choices.
    """
    kept = relaxed.shortfalls <= radius
    opened = np.flatnonzero(kept.sum(axis=1) > 1)
    chosen = relaxed.shortfalls.argmin(axis=1)
    chosen[opened] = relaxed.nominal[opened]
    second = np.sort(relaxed.shortfalls[opened], axis=1)[:, 1] if len(opened) else np.zeros(0)
    # A whole search ends with the best second choices, so that its lists are short until the last groups; but it, too,
    # begins with the groups that the relaxation divides: how they are not divided says most about the rest.
    second = np.where(relaxed.divided[opened], -np.inf, -second if whole else second)
    opened = opened[np.argsort(second, kind="stable")]
    tilts = _Tilts.of(relaxed, kept)
    halves, complete = _halves(relaxed, opened, kept, chosen, tilts), True
    for index, group in enumerate(opened):
        half = min(halves, key=lambda half: len(half.short))
        choices = np.flatnonzero(kept[group])
        ends = np.searchsorted(half.short, radius - relaxed.shortfalls[group, choices], side="right")
        if ends.sum() > most_states:
            complete = False
            if whole:
                return Search(None, complete)
            half.settle(relaxed, opened[index:])
            break
        work.spend(int(ends.sum()))
        _extend(half, relaxed, tilts, int(group), choices, ends, radius)
        if not len(half.short):
            return Search(None, complete)
    pair = _join(*halves, relaxed, radius, work)
    if pair is None:
        return Search(None, complete)
    for half, state in zip(halves, (pair.first, pair.other), strict=True):
        half.write(state, chosen)
    return Search(Found(pair.gap, chosen), complete)


class _Tilts(NamedTuple):
    """Other prices than those of the relaxation, each of which bounds what a partial allocation may come to.

    Let a partial allocation fall short by s and leave shares t of the limits. Prices lower by d (at most the prices
    themselves, so that unused shares are not worth less than nothing) say that all that begins with it falls short by
    at least s + d t, plus the least (shortfall - d cost) of each group still open. The prices of the relaxation, d = 0,
    are the best ones for all groups, but not for those that are left where much or little of a limit has been used.
    """

    lower: Floats  # [tilts, constraints]
    least: Floats  # [tilts, groups]

    @classmethod
    def of(cls, relaxed: Relaxed, kept: NDArray[np.bool_]) -> Self:
        generator, count = np.random.default_rng(0), len(relaxed.spare)
        directions = generator.normal(size=(TILTS, count))
        directions *= 10 ** generator.uniform(-3, 0.3, (TILTS, 1)) / np.linalg.norm(directions, axis=1, keepdims=True)
        lower = np.concatenate([np.zeros((1, count)), np.eye(count), np.minimum(directions, 1.0)])
        lower *= relaxed.prices
        where = np.nonzero(kept)
        values = relaxed.shortfalls[where] - lower @ relaxed.shares(relaxed.costs[where].T)
        return cls(lower, np.minimum.reduceat(values, np.searchsorted(where[0], np.arange(len(kept))), axis=1))

    def within(self, radius: float, half: "_Half", left: Floats, short: Floats) -> Indices:
        """Which states, given by shares left and shortfalls, may end in the radius, by those tilts that say most."""
        states = np.arange(len(short))
        if len(states) < FEW:
            return states
        sample = np.linspace(0, len(short), min(len(short), SAMPLE), endpoint=False, dtype=np.intp)
        best = (self.lower @ left[:, sample] + half.rest[:, None]).argmax(axis=0)
        chosen = np.argsort(-np.bincount(best, minlength=len(self.lower)), kind="stable")[:BEST]
        for lower, rest in zip(self.lower[chosen], half.rest[chosen], strict=True):
            alive = lower @ left + short <= radius - rest
            if not alive.all():
                states, left, short = states[alive], left[:, alive], short[alive]
        return states


def _halves(
    relaxed: Relaxed, opened: Indices, kept: NDArray[np.bool_], chosen: Indices, tilts: _Tilts
) -> tuple[_Half, _Half]:
    """One half with the choices of all groups that are not open, and an empty one."""
    closed = np.setdiff1d(np.arange(len(chosen)), opened)
    used, nothing = relaxed.costs[closed, chosen[closed]].sum(axis=0) + 0 * relaxed.spare, 0 * relaxed.spare
    costs, open_kept = relaxed.costs[opened], kept[opened, :, None]
    least = nothing + np.where(open_kept, costs, relaxed.spare).min(axis=1).sum(axis=0)
    rest = tilts.least[:, opened].sum(axis=1)
    return (
        _Half(used[:, None], np.zeros(1), least, rest),
        _Half(nothing[:, None], np.zeros(1), used + least, rest - tilts.lower @ relaxed.shares(used)),
    )


def _extend(
    half: _Half, relaxed: Relaxed, tilts: _Tilts, group: int, choices: Indices, ends: Indices, radius: float
) -> None:
    """Let the states before each end make that choice of one more group, and leave out what cannot end well."""
    costs = relaxed.costs[group, choices].T
    half.least, half.rest = half.least - costs.min(axis=1), half.rest - tilts.least[:, group]
    parents, places = np.concatenate([np.arange(end) for end in ends]), np.repeat(np.arange(len(ends)), ends)
    choices = choices[places]
    used, short = half.used[:, parents] + costs[:, places], half.short[parents] + relaxed.shortfalls[group, choices]
    states = np.flatnonzero((relaxed.spare[:, None] - used >= half.least[:, None]).all(axis=0))
    left = relaxed.shares(relaxed.spare[:, None] - used[:, states])
    states = states[tilts.within(radius + relaxed.rounding, half, left, short[states])]
    if len(states) >= half.compare_at:
        undominated = _undominated(used, relaxed.worth(used) - short, states, relaxed)
        # Comparing takes longer than all else: where it leaves out little, the next time is put off.
        half.compare_at = max(len(undominated), 8) * (2 if len(undominated) < 0.8 * len(states) else 16)
        states = undominated
    states = states[np.argsort(short[states], kind="stable")]
    half.steps.append((group, parents[states], choices[states]))
    half.used, half.short = used[:, states], short[states]


def _undominated(used: Integers, score: Floats, states: Indices, relaxed: Relaxed) -> Indices:
    """The given states without those whose score another one reaches at no more cost.

    Under several constraints not every such state is found, for comparing all takes too long: a state is compared with
    the best of all that are cheaper by the dearest constraint and stay below one of some levels by the others.
    """
    used, score = used[np.argsort(-relaxed.prices, kind="stable")][:, states], score[states]
    order = np.lexsort((-score, *used[::-1]))
    states, used, score = states[order], used[:, order], score[order]
    kept = np.ones(len(states), dtype=bool)
    if len(used) == 1:
        kept[1:] = score[1:] > np.maximum.accumulate(score)[:-1]
        return states[kept]
    kept[1:] = (used[:, 1:] < used[:, :-1]).any(axis=0) | (score[1:] > score[:-1])
    others = used[1:]
    levels = np.sort(others, axis=1)[:, len(states) * np.arange(1, LEVELS) // LEVELS].T[:, :, None]
    highest = np.sum([(others >= level).all(axis=0) for level in levels], axis=0) - 1
    for index, level in enumerate(levels):
        best = np.maximum.accumulate(np.where((others <= level).all(axis=0), score, -np.inf))
        above = np.flatnonzero(highest[1:] == index) + 1
        kept[above] &= score[above] > best[above - 1]
    return states[kept]


class _Tree(NamedTuple):
    """Partial allocations in nested boxes, each of FANOUT smaller ones."""

    order: Indices
    starts: Indices  # where the smallest boxes start in the order, and its end
    corners: list[tuple[Integers, Integers, Floats]]  # of each level: least and most used, least shortfall


def _tree(half: _Half, relaxed: Relaxed) -> _Tree:
    """Split by one measure after the other, the one that spreads most in worth first."""
    spreads = [*(np.ptp(relaxed.shares(half.used), axis=1) * relaxed.prices), np.ptp(half.short)]
    measures = [(*half.used, half.short)[index] for index in np.argsort(spreads)[::-1]]
    order, boxes, starts = np.arange(len(half.short)), np.zeros(len(half.short), np.intp), [np.array([0])]
    while len(starts[-1]) * FANOUT <= len(order):
        order = order[np.lexsort((measures[(len(starts) - 1) % len(measures)][order], boxes))]
        count = len(starts[-1]) * FANOUT
        starts.append(np.arange(count) * len(order) // count)
        boxes = np.repeat(np.arange(count), np.diff(starts[-1], append=len(order)))
    used, short = half.used[:, order], half.short[order]
    corners = [
        (np.minimum.reduceat(used, start, 1), np.maximum.reduceat(used, start, 1), np.minimum.reduceat(short, start))
        for start in starts[1:]
    ]
    return _Tree(order, np.append(starts[-1], len(order)), corners)


class _Pair(NamedTuple):
    """A state of each half; pairs compare by their gap, but for rounding, and then by what they use."""

    rank: float
    above: list[int]  # what they use above the limits
    gap: float
    first: int
    other: int


def _join(first: _Half, other: _Half, relaxed: Relaxed, radius: float, work: Work) -> _Pair | None:
    """The states of both halves that together keep all limits and fall short least, within the radius.

    Under one constraint the cheapest of several such pairs is taken; under more there may be too many to compare.
    """
    tree, best, start, size = _tree(other, relaxed), None, 0, 4
    while start < len(first.short):
        states = np.arange(start, min(start + size, len(first.short)))
        start, size = start + size, min(2 * size, CHUNK // FANOUT)
        states, others = _candidates(first, states, other, tree, relaxed, radius, work)
        pair = _best_pair(first, states, other, others, relaxed, radius)
        if pair is not None and (best is None or pair < best):
            best, radius = pair, pair.gap + relaxed.rounding * (1 if len(relaxed.spare) == 1 else -2)
    return best


def _candidates(
    first: _Half, states: Indices, other: _Half, tree: _Tree, relaxed: Relaxed, radius: float, work: Work
) -> tuple[Indices, Indices]:
    """Pairs of the given states with those of the other half in whose boxes a good one may be."""
    boxes = np.zeros(len(states), dtype=np.intp)
    for least, most, short in tree.corners:
        states, boxes = np.repeat(states, FANOUT), (boxes[:, None] * FANOUT + np.arange(FANOUT)).ravel()
        work.spend(len(states))
        left = relaxed.spare[:, None] - first.used[:, states]
        gap = first.short[states] + short[boxes] + relaxed.worth(np.maximum(left - most[:, boxes], 0))
        alive = (left >= least[:, boxes]).all(axis=0) & (gap <= radius)
        states, boxes = states[alive], boxes[alive]
    widths = np.diff(tree.starts)[boxes]
    work.spend(int(widths.sum()))
    places = np.arange(widths.sum()) + np.repeat(tree.starts[boxes] - np.cumsum(widths) + widths, widths)
    return np.repeat(states, widths), tree.order[places]


def _best_pair(
    first: _Half, states: Indices, other: _Half, others: Indices, relaxed: Relaxed, radius: float
) -> _Pair | None:
    unused = relaxed.spare[:, None] - first.used[:, states] - other.used[:, others]
    gaps = first.short[states] + other.short[others] + relaxed.worth(unused)
    good = np.flatnonzero((unused >= 0).all(axis=0) & (gaps <= radius))
    if not len(good):
        return None
    ranks = np.round(gaps[good] / relaxed.rounding)
    equal = good[ranks == ranks.min()]
    place = equal[np.lexsort(-unused[::-1, equal])[0]]
    left = (-unused[:, place]).tolist()
    return _Pair(float(ranks.min()), left, float(gaps[place]), int(states[place]), int(others[place]))
