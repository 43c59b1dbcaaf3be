"""Search of a multiple-choice knapsack's core: the allocations that fall short of a bound by at most a radius.

Dynamic programming with lists (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, ch. 11.5): the groups are decided
one after the other, and partial allocations are left out that another one dominates, or whose bound is too far. Where
a list grows all the same, a second one grows from the last groups, and two that fit together are sought at the end.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from saq_fx.knapsack_core import Bounds, Core, Floats, Found, Indices, Integers, Relaxed, Work
from saq_fx.knapsack_join import States, join

LONGER = 16  # the first list by the second, from which on the second grows, where costs give the order
CHILDREN = 4  # by the states that a list may hold: what is looked at for the next list
AFTER = 2000  # partial allocations, at least, after which better prices are sought
COMPARED = 32  # states from which on dominated ones are left out
CELLS, CELLS_EACH = 1 << 18, 64  # of the grid in which they are looked for, and by states


class Search(NamedTuple):
    """What one search of the core gave; `complete` if it left out no allocation within its radius."""

    found: Found | None
    complete: bool


@dataclass
class _Half:
    """Partial allocations over some groups, those with the best bounds first."""

    outside: NDArray[np.bool_]  # [groups]: those not decided
    least: Integers  # [constraints]: what these use at least
    most: Integers
    bounds: Bounds
    states: States
    bound: Floats  # [states]
    by: Indices  # [states]: which prices give the bound
    steps: list[tuple[int, Indices, Indices]] = field(default_factory=list)  # group, each state's parent and choice
    looked_at: int = 0  # partial allocations since prices were last sought

    @classmethod
    def empty(cls, core: Core) -> Self:
        """No group is decided."""
        kept = np.isfinite(core.shortfalls)
        least = np.where(kept, core.costs, core.costs.max(initial=0)).min(axis=2).sum(axis=1)
        most = np.where(kept, core.costs, 0).max(axis=2).sum(axis=1)
        bounds = Bounds.of(core, np.zeros((1, len(core.room))))
        states = States(0 * core.room[:, None], np.zeros(1))
        return cls(np.ones(len(kept), bool), least, most, bounds, states, np.zeros(1), np.zeros(1, np.intp))

    def children(self, core: Core, place: int, limit: int) -> tuple[Indices, Indices, bool]:
        """Parents and choices of a group that come into question, at most `limit`, and whether these are all.

        The prices that bound a parent tell at once how far a choice falls short of the best one.
        """
        shortfalls = core.shortfalls[place] - self.bounds.lower @ core.shares[:, place]
        bound = self.bound[:, None] + (shortfalls - self.bounds.least[:, place, None])[self.by]
        children = np.flatnonzero(bound <= core.reach)
        complete = len(children) <= limit
        if not complete:
            children = np.sort(children[np.argpartition(bound.ravel()[children], limit)[:limit]])
        return *np.divmod(children, bound.shape[1]), complete

    def decide(self, core: Core, place: int) -> None:
        """Count a group as decided."""
        costs = core.costs[:, place, np.isfinite(core.shortfalls[place])]
        self.outside[place] = False
        self.least, self.most = self.least - costs.min(axis=1), self.most - costs.max(axis=1)

    def near(self, core: Core, states: States) -> tuple[Indices, Floats, Indices]:
        """Which states may end within the radius, and the bounds of these with the prices that give them."""
        fit = np.flatnonzero((core.room[:, None] - states.used >= self.least[:, None]).all(axis=0))
        left, short = core.left(states.used[:, fit]), states.short[fit]
        self.looked_at += len(fit)
        if self.looked_at >= max(AFTER, core.shortfalls[self.outside].size):
            self.looked_at, self.bounds = 0, self.bounds.improved(core, left, short, self.outside)
        bound, by = self.bounds.best(left, short, self.outside)
        near = bound <= core.reach
        return fit[near], bound[near], by[near]

    def undominated(self, core: Core, states: States) -> Indices:
        """The states that are left when those go that another one equals at no more cost."""
        used = states.used
        if len(used) > 1:  # what the groups outside leave over in any case counts for nothing
            used = np.maximum(used, (core.room - self.most)[:, None])
        return _undominated(used, core.relaxed.worth(states.used) - states.short)

    def write(self, core: Core, state: int, chosen: Indices) -> None:
        """Write the choices that led to a state."""
        for place, parents, choices in reversed(self.steps):
            chosen[core.groups[place]], state = core.choices[place, choices[state]], int(parents[state])


def search(relaxed: Relaxed, radius: float, most_states: int, work: Work, *, by_cost: bool = True) -> Search:
    """The allocation that falls short least, among those within the radius.

    Of a list that would outgrow `most_states` the best are kept, by their bounds; but where the order is not that of
    costs bounds say little, and this ends the search.
    """
    core = Core.of(relaxed, radius, by_cost=by_cost)
    halves, complete = (_Half.empty(core), _Half.empty(core)), True
    if (core.room < halves[0].least).any():
        return Search(None, complete)
    places = list(range(len(core.groups)))
    while places:
        first = len(halves[0].bound) <= (LONGER if by_cost else 1) * len(halves[1].bound)
        half, place = (halves[0], places.pop(0)) if first else (halves[1], places.pop())
        complete &= _extend(half, core, place, most_states, work)
        if not len(half.bound) or not (complete or by_cost):
            return Search(None, complete)
    pair = join(halves[0].states, halves[1].states, core, work)
    if pair is None:
        return Search(None, complete)
    chosen = relaxed.shortfalls.argmin(axis=1)
    for half, state in zip(halves, (pair.first, pair.other), strict=True):
        half.write(core, state, chosen)
    return Search(Found(pair.gap, chosen), complete)


def _extend(half: _Half, core: Core, place: int, most_states: int, work: Work) -> bool:
    """Let the states make each choice of one more group, and leave out what cannot end well; whether that is all."""
    work.spend(len(half.bound) * core.choices.shape[1])
    parents, choices, complete = half.children(core, place, CHILDREN * most_states)
    half.decide(core, place)
    used = half.states.used[:, parents] + core.costs[:, place, choices]
    states = States(used, half.states.short[parents] + core.shortfalls[place, choices])
    near, bound, by = half.near(core, states)
    order = np.argsort(bound, kind="stable")
    if len(near) >= COMPARED:
        near, bound, by = near[order], bound[order], by[order]
        order = half.undominated(core, States(states.used[:, near], states.short[near]))
    complete &= len(order) <= most_states
    order = order[:most_states]
    kept, half.bound, half.by = near[order], bound[order], by[order]
    half.states = States(states.used[:, kept], states.short[kept])
    half.steps.append((place, parents[kept], choices[kept]))
    return complete


def _undominated(used: Integers, score: Floats) -> Indices:
    """The states without those whose score another one reaches at no more cost.

    Almost all of these are found: a state is compared with the best of those below it in a grid. Its lines are costs of
    states; a state lies at the first lines not below its costs, and is compared with all up to the last not above.
    """
    lines = int(min(CELLS, CELLS_EACH * len(score)) ** (1 / len(used)))
    places, ends = [], []
    for costs in used:
        grid = np.unique(np.sort(costs)[:: -(-len(costs) // lines)])
        places.append(np.searchsorted(grid, costs, side="left"))
        ends.append(np.searchsorted(grid, costs, side="right") - 1)
    best = np.full([place.max() + 1 for place in places], -np.inf)
    np.maximum.at(best, tuple(places), score)
    for axis in range(len(used)):
        np.maximum.accumulate(best, axis=axis, out=best)
    kept = np.flatnonzero(score >= best[tuple(ends)])
    order = kept[np.lexsort((-score[kept], *used[:, kept]))]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (used[:, order[1:]] != used[:, order[:-1]]).any(axis=0)
    return np.sort(order[new])
