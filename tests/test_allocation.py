"""Allocation against brute force, in exact arithmetic, and the laws that hold at any size."""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saq_fx import knapsack, knapsack_search
from saq_fx.allocation import Constraint, Table, allocate, allocate_under, frontier, smallest
from saq_fx.errors import InfeasibleBudgetError, PrecisionError, SaqError

Strategy = st.SearchStrategy[Any]

SMALL = st.just(st.integers(-3, 6))
COSTS = st.sampled_from(
    [
        st.integers(0, 6),
        st.integers(0, 10**12),
        st.floats(0, 1e12),
        st.sampled_from([0.1, 0.2, 0.3, 0.7]),
        st.sampled_from([0.0, 1e-9, 1.0, 1 + 1e-12, 1e9, 1e12, 5e-324]),
    ]
)
SCORES = st.sampled_from([st.integers(-3, 3), st.floats(-1, 1), st.sampled_from([0.1, 0.2, 0.3])])


@st.composite
def instances(
    draw: Callable[[Any], Any], constraints: int, costs_of: Strategy = COSTS, scores_of: Strategy = SCORES
) -> tuple[list[Constraint], Table]:
    """Small tables with ties, and limits that are often exactly the cost of some allocation."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    witness = [draw(st.integers(0, size - 1)) for size in sizes]
    score = draw(scores_of)
    scores = [draw(st.lists(score, min_size=size, max_size=size)) for size in sizes]
    columns = []
    for _ in range(constraints):
        cost = draw(costs_of)
        costs = [draw(st.lists(cost, min_size=size, max_size=size)) for size in sizes]
        attained = smallest([[row[index]] for row, index in zip(costs, witness, strict=True)])
        limit = draw(st.one_of(st.just(attained), st.floats(0, 1.2).map(attained.__mul__)))
        columns.append(Constraint(costs, limit))
    return columns, scores


def total(table: Table, chosen: tuple[int, ...] | list[int]) -> Fraction:
    return sum((Fraction(row[index]) for row, index in zip(table, chosen, strict=True)), Fraction())


def keeps(columns: list[Constraint], chosen: tuple[int, ...] | list[int]) -> bool:
    return all(total(column.costs, chosen) <= Fraction(column.limit) for column in columns)


def feasible(columns: list[Constraint], scores: Table) -> list[tuple[int, ...]]:
    every = itertools.product(*(range(len(row)) for row in scores))
    return [chosen for chosen in every if keeps(columns, chosen)]


def check_against_brute_force(columns: list[Constraint], scores: Table) -> None:
    candidates = feasible(columns, scores)
    if not candidates:
        with pytest.raises(InfeasibleBudgetError):
            allocate_under(columns, scores)
        return
    chosen = allocate_under(columns, scores)
    assert keeps(columns, chosen)
    best = max(total(scores, candidate) for candidate in candidates)
    assert float(total(scores, chosen)) == pytest.approx(float(best), rel=1e-12, abs=1e-12)


@given(instances(constraints=1))
def test_one_constraint_equals_brute_force(instance: tuple[list[Constraint], Table]) -> None:
    check_against_brute_force(*instance)


@given(st.integers(2, 3).flatmap(instances))
def test_several_constraints_equal_brute_force(instance: tuple[list[Constraint], Table]) -> None:
    check_against_brute_force(*instance)


@given(st.integers(1, 3).flatmap(instances))
def test_what_long_lists_need_leaves_the_optimum(instance: tuple[list[Constraint], Table]) -> None:
    """Other prices, dominance, and a second list from the last groups: here short lists have them, too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AFTER", "COMPARED", "LONGER"):
            patch.setattr(knapsack_search, name, 0)
        check_against_brute_force(*instance)


@given(st.integers(1, 3).flatmap(instances))
def test_lists_that_are_cut_leave_the_optimum(instance: tuple[list[Constraint], Table]) -> None:
    """What was cut is not taken for proven: longer lists follow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "SHORT", 1)
        patch.setattr(knapsack, "LONGER", 2)
        check_against_brute_force(*instance)


@contextmanager
def short_lists(most: int = 1) -> Iterator[None]:
    """No room to enumerate, so that HiGHS has to prove, however long a loaded machine takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "TURNS", ((most, 60.0),))
        patch.setattr(knapsack, "SHORT", 1)
        patch.setattr(knapsack, "LONGEST", 1)
        yield


@given(st.integers(1, 3).flatmap(lambda count: instances(count, SMALL, SMALL)))
def test_highs_equals_brute_force(instance: tuple[list[Constraint], Table]) -> None:
    with short_lists():
        check_against_brute_force(*instance)


@given(st.integers(1, 3).flatmap(lambda count: instances(count, SMALL, SMALL)))
def test_searches_around_an_allocation_leave_the_optimum(instance: tuple[list[Constraint], Table]) -> None:
    """They improve on what was found: here, where nothing else does, over few groups and over all."""
    for free in (2, 5):
        with short_lists(10_000), pytest.MonkeyPatch.context() as patch:
            patch.setattr(knapsack, "FREE", free)
            check_against_brute_force(*instance)


@given(instances(constraints=1))
def test_highs_keeps_the_limit_exactly(instance: tuple[list[Constraint], Table]) -> None:
    """Also where one solution exceeds it by less than the solver's tolerance."""
    columns, scores = instance
    if feasible(columns, scores):
        with short_lists():
            assert keeps(columns, allocate_under(columns, scores))


@given(instances(constraints=1))
def test_equal_scores_take_the_cheapest(instance: tuple[list[Constraint], Table]) -> None:
    (column,), scores = instance
    level = [[0.0] * len(row) for row in scores]
    if feasible([column], level):
        chosen = allocate(column.costs, level, column.limit)
        assert total(column.costs, chosen) == sum(Fraction(min(row)) for row in column.costs)


@given(instances(constraints=1))
def test_score_rises_with_the_budget(instance: tuple[list[Constraint], Table]) -> None:
    (column,), scores = instance
    least, most = smallest(column.costs), math.fsum(map(max, column.costs))
    reached = [
        float(total(scores, allocate(column.costs, scores, budget)))
        for budget in sorted(max(least, most * share) for share in (0.0, 0.3, 0.6, 1.0))
    ]
    assert all(low <= high + 1e-12 for low, high in itertools.pairwise(reached))


def large(groups: int, seed: int) -> tuple[Table, Table]:
    """Layers of convolution-like costs, 25 pairs of bits each, and the noisy scores that a search leaves."""
    rng = np.random.default_rng(seed)
    bits = np.array([(w, a) for w in (2, 3, 4, 5, 6) for a in (2, 3, 4, 5, 6)])
    macs = rng.integers(1, 4000, groups) * 50176
    scores = rng.normal(0, 1e-3, (groups, 25)) - rng.lognormal(0, 1, (groups, 1)) * (4.0**-bits).sum(axis=1)
    return np.outer(macs, bits.prod(axis=1)).astype(float).tolist(), scores.tolist()


def test_large_instances_are_repeatable_and_within_the_linear_bound() -> None:
    costs, scores = large(groups=60, seed=0)
    budget = 0.3 * math.fsum(map(max, costs))
    chosen = allocate(costs, scores, budget)
    assert chosen == allocate(costs, scores, budget)
    assert total(costs, chosen) <= budget
    points = frontier(costs, scores)
    below, above = next(pair for pair in itertools.pairwise(points) if pair[0][0] <= budget < pair[1][0])
    bound = below[1] + (above[1] - below[1]) * (budget - below[0]) / (above[0] - below[0])
    assert below[1] <= float(total(scores, chosen)) <= bound + 1e-12


@pytest.mark.parametrize("seed", [0, 3])
def test_two_binding_budgets_need_no_solver(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 layers, 25 choices; both limits bind, so that states are compared by two costs."""

    monkeypatch.setattr(knapsack, "milp", None)
    bitops, scores = large(groups=200, seed=seed)
    rng = np.random.default_rng(seed)
    weights = np.repeat([2.0, 3, 4, 5, 6], 5) * rng.integers(1, 4000, (200, 1)) * 144
    columns = [
        Constraint(costs, share * math.fsum(map(max, costs)))
        for costs, share in ((bitops, 0.25), (weights.tolist(), 0.48))
    ]
    chosen = allocate_under(columns, scores)
    assert keeps(columns, chosen)
    used = [float(total(column.costs, chosen)) / column.limit for column in columns]
    assert min(used) > 0.95
    alone = allocate(bitops, scores, columns[0].limit)
    assert total(scores, chosen) <= total(scores, alone)


def test_budget_of_an_attainable_sum_beats_the_budget_just_below() -> None:
    costs = [[0, 10**12], [0, 10**12 - 1], [0, 1]]
    scores: Table = [[0, 3], [0, 2.5], [0, 1]]
    assert allocate(costs, scores, 2 * 10**12) == [1, 1, 1]
    assert allocate(costs, scores, 2 * 10**12 - 1) == [1, 1, 0]
    assert allocate(costs, scores, 10**12) == [0, 1, 1]


def test_no_groups() -> None:
    assert allocate([], [], 0.0) == []


SIZES = ((2000, 1e5), (3000, 1e2), (3000, 1e2))  # of layers: the most, and the unit
BITS = np.array([(w, a) for w in (2, 3, 4, 6, 8) for a in (2, 3, 4, 6, 8)])


def three_budgets(groups: int, shares: tuple[float, float, float]) -> tuple[list[Constraint], Table]:
    """BitOps, bytes of weights and of activations, and scores that fall with the error of rounding."""
    rng = np.random.default_rng(0)
    macs, weights, outputs = (rng.integers(1, most, (groups, 1)) * unit for most, unit in SIZES)
    tables = macs * BITS.prod(axis=1), weights * BITS[:, 0], outputs * BITS[:, 1]
    scores = -rng.exponential(size=(groups, 2)) @ (4.0**-BITS).T
    columns = []
    for costs, share in zip(tables, shares, strict=True):
        least, most = costs.min(axis=1).sum(), costs.max(axis=1).sum()
        columns.append(Constraint(costs.tolist(), least + share * (most - least)))
    return columns, scores.tolist()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_200_layers_take_about_a_second_and_print_nothing(count: int, capfd: pytest.CaptureFixture[str]) -> None:
    columns, scores = three_budgets(200, (0.2, 0.3, 0.3))
    start = time.process_time()
    chosen = allocate_under(columns[:count], scores)
    assert time.process_time() - start < 3  # 0.1 to 0.3 s on a free core
    assert keeps(columns[:count], chosen)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_scores_proportional_to_a_cost_are_proven(count: int) -> None:
    """A subset-sum problem: every choice is as good as any other, and only what is left of the limit counts."""
    columns, _ = three_budgets(200, (0.3, 0.4, 0.4))
    costs = columns[0].costs
    chosen = allocate_under(columns[:count], costs)
    assert keeps(columns[:count], chosen)
    spread = math.fsum(map(max, costs)) - math.fsum(map(min, costs))
    assert total(costs, chosen) >= columns[0].limit - 1e-9 * spread


def test_the_only_feasible_allocation_is_found() -> None:
    """Numbers of 40 bits in two bags that are both full: the limits leave one way to divide them."""
    rng = random.Random(1)
    sizes = [rng.randrange(1, 2**40) for _ in range(30)]
    sides = [rng.random() < 0.5 for _ in sizes]
    bags: list[Table] = [[[size, 0] for size in sizes], [[0, size] for size in sizes]]
    columns = [Constraint(bag, float(total(bag, sides))) for bag in bags]
    chosen = allocate_under(columns, [[rng.random(), rng.random()] for _ in sizes])
    assert chosen == [int(side) for side in sides]


def test_limits_that_even_fractions_cannot_keep_are_refused_at_once() -> None:
    columns, scores = three_budgets(1000, (0.5, 0.1, 0.1))
    opposed: Table = [[max(row) - cost for cost in row] for row in columns[1].costs]
    columns = [columns[1], Constraint(opposed, 0.5 * math.fsum(map(max, opposed)))]
    with pytest.raises(InfeasibleBudgetError, match="not all of them together"):
        allocate_under(columns, scores)


def test_unfinished_search_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "TURNS", ((700_000, 0.0),))  # without HiGHS, whose seconds are a machine's own
    columns, scores = three_budgets(200, (0.3, 0.1, 0.8))
    with pytest.warns(UserWarning, match="not proven optimal; one may score .* more"):
        chosen = allocate_under(columns, scores)
    assert keeps(columns, chosen)


def test_no_allocation_found_is_not_called_infeasible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "TURNS", ())
    with pytest.raises(SaqError, match=r"found no allocation .* and no proof") as caught:
        allocate_under([Constraint([[0, 2]], 1), Constraint([[2, 0]], 2)], [[1, 1]])
    assert not isinstance(caught.value, InfeasibleBudgetError)


def test_infeasible_budget_names_the_smallest_feasible_one() -> None:
    costs: Table = [[3, 4], [5, 9.5]]
    with pytest.raises(InfeasibleBudgetError, match=r"smallest feasible budget is 8, the one given is 7\.25"):
        allocate(costs, costs, 7.25)
    assert allocate(costs, costs, 8) == [0, 0]


@given(st.lists(st.lists(st.floats(0, 1e12), min_size=1, max_size=3), min_size=1, max_size=5))
def test_smallest_is_the_smallest_feasible_budget(costs: Table) -> None:
    least = smallest(costs)
    assert total(costs, allocate(costs, costs, least)) <= least
    with pytest.raises(InfeasibleBudgetError, match="smallest feasible"):
        allocate(costs, costs, math.nextafter(least, -math.inf))


def test_each_violated_constraint_is_named_with_its_unit() -> None:
    size = Constraint([[3, 4], [5, 6]], 7, name="weight size", unit="bytes")
    bitops = Constraint([[10, 20], [30, 40]], 39, name="BitOps")
    roomy = Constraint([[0, 1], [0, 1]], 2, name="roomy")
    with pytest.raises(InfeasibleBudgetError) as caught:
        allocate_under([size, bitops, roomy], [[0, 0], [0, 0]])
    assert str(caught.value) == (
        "weight size: the smallest feasible budget is 8 bytes, the one given is 7 bytes; "
        "BitOps: the smallest feasible budget is 40, the one given is 39"
    )


def test_jointly_infeasible_constraints_give_each_minimum() -> None:
    size, time = Constraint([[0, 2]], 1, name="size"), Constraint([[2, 0]], 1, name="time")
    message = "each limit can be kept alone, but not all of them together: size: .* is 0, .*; time: .* is 0,"
    with pytest.raises(InfeasibleBudgetError, match=message):
        allocate_under([size, time], [[1, 1]])


@pytest.mark.parametrize(
    ("costs", "scores", "limit", "message"),
    [
        ([[1], []], [[1], [1]], 5, "cost: group 1 has no choices"),
        ([[1], [2]], [[1], []], 5, "scores: group 1 has no choices"),
        ([[1], [2, math.nan]], [[1], [1, 2]], 5, "cost: group 1 holds a value that is not finite"),
        ([[1], [2]], [[math.inf], [1]], 5, "scores: group 0 holds a value that is not finite"),
        ([[1], [2, 3]], [[1], [1]], 5, "cost: group 1 has 2 costs, but 1 scores"),
        ([[1], [2]], [[1]], 5, "cost: costs of 2 groups, but scores of 1"),
        ([[1]], [[1]], math.inf, "cost: the limit should be a finite number, not inf"),
        ([[1]], [[1]], math.nan, "cost: the limit should be a finite number, not nan"),
    ],
)
def test_malformed_tables_name_the_group(costs: Table, scores: Table, limit: float, message: str) -> None:
    with pytest.raises(PrecisionError, match=message):
        allocate(costs, scores, limit)


def test_no_constraint_is_an_error() -> None:
    with pytest.raises(PrecisionError, match="at least one constraint"):
        allocate_under([], [[1, 2]])


@given(instances(constraints=1))
def test_frontier_points_are_optimal_at_their_cost(instance: tuple[list[Constraint], Table]) -> None:
    (column,), scores = instance
    points = frontier(column.costs, scores)
    every = list(itertools.product(*(range(len(row)) for row in scores)))
    for cost, score, chosen in points:
        exact = total(column.costs, chosen)
        best = max(total(scores, other) for other in every if total(column.costs, other) <= exact)
        assert cost == float(exact)
        assert score == pytest.approx(float(best), rel=1e-12, abs=1e-12)
    assert points[0][0] == pytest.approx(smallest(column.costs))
    assert points[-1][1] == pytest.approx(math.fsum(map(max, scores)), abs=1e-12)
    assert all(low[0] <= high[0] and low[1] <= high[1] for low, high in itertools.pairwise(points))
