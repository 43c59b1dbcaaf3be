"""Two lists of partial allocations, and the pair of them that keeps all limits and falls short of the bound least.

Horowitz and Sahni, Computing partitions with applications to the knapsack problem, 1974, for several limits: one list
is kept as a tree of boxes.
"""

from typing import NamedTuple

import numpy as np

from saq_fx.knapsack_core import Core, Floats, Indices, Integers, Relaxed, Work

FANOUT = 8  # boxes within a box
CHUNK = 1 << 17  # pairs looked at together


class States(NamedTuple):
    """Partial allocations over the same groups."""

    used: Integers  # [constraints, states]
    short: Floats  # [states]


class _Tree(NamedTuple):
    """Partial allocations in nested boxes, each of FANOUT smaller ones."""

    order: Indices
    starts: Indices  # where the smallest boxes start in the order, and its end
    corners: list[tuple[Integers, Integers, Floats]]  # of each level: least and most used, least shortfall


def _tree(half: States, relaxed: Relaxed) -> _Tree:
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


class Pair(NamedTuple):
    """A state of each half; pairs compare by their gap, but for rounding, and then by what they use."""

    rank: float
    above: list[int]  # what they use above the limits
    gap: float
    first: int
    other: int


def join(first: States, other: States, core: Core, work: Work) -> Pair | None:
    """The states of both halves that together keep all limits and fall short least, within the radius.

    Under one constraint the cheapest of several such pairs is taken; under more there may be too many to compare.
    """
    relaxed, radius = core.relaxed, core.radius
    tree, best, start, size = _tree(other, relaxed), None, 0, 4
    while start < len(first.short):
        states = np.arange(start, min(start + size, len(first.short)))
        start, size = start + size, min(2 * size, CHUNK // FANOUT)
        states, others = _candidates(first, states, other, tree, core, radius, work)
        pair = _best_pair(first, states, other, others, core, radius)
        if pair is not None and (best is None or pair < best):
            best, radius = pair, pair.gap + relaxed.rounding * (1 if len(relaxed.spare) == 1 else -2)
    return best


def _candidates(
    first: States, states: Indices, other: States, tree: _Tree, core: Core, radius: float, work: Work
) -> tuple[Indices, Indices]:
    """Pairs of the given states with those of the other half in whose boxes a good one may be."""
    boxes = np.zeros(len(states), dtype=np.intp)
    for least, most, short in tree.corners:
        states, boxes = np.repeat(states, FANOUT), (boxes[:, None] * FANOUT + np.arange(FANOUT)).ravel()
        work.spend(len(states))
        left = core.room[:, None] - first.used[:, states]
        gap = first.short[states] + short[boxes] + core.relaxed.worth(np.maximum(left - most[:, boxes], 0))
        alive = (left >= least[:, boxes]).all(axis=0) & (gap <= radius)
        states, boxes = states[alive], boxes[alive]
    widths = np.diff(tree.starts)[boxes]
    work.spend(int(widths.sum()))
    places = np.arange(widths.sum()) + np.repeat(tree.starts[boxes] - np.cumsum(widths) + widths, widths)
    return np.repeat(states, widths), tree.order[places]


def _best_pair(
    first: States, states: Indices, other: States, others: Indices, core: Core, radius: float
) -> Pair | None:
    relaxed = core.relaxed
    unused = core.room[:, None] - first.used[:, states] - other.used[:, others]
    gaps = first.short[states] + other.short[others] + relaxed.worth(unused)
    good = np.flatnonzero((unused >= 0).all(axis=0) & (gaps <= radius))
    if not len(good):
        return None
    ranks = np.round(gaps[good] / relaxed.rounding)
    equal = good[ranks == ranks.min()]
    place = equal[np.lexsort(-unused[::-1, equal])[0]]
    left = (-unused[:, place]).tolist()
    return Pair(float(ranks.min()), left, float(gaps[place]), int(states[place]), int(others[place]))
