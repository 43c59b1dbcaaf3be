"""Allocation against brute force, in exact arithmetic, and the laws that hold at any size."""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saq_fx import allocation
from saq_fx.allocation import Constraint, Table, allocate, allocate_under, frontier, smallest
from saq_fx.errors import InfeasibleBudgetError, PrecisionError

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


@given(st.integers(1, 2).flatmap(lambda count: instances(count, SMALL, SMALL)))
def test_highs_equals_brute_force(instance: tuple[list[Constraint], Table]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_STATES", 0)
        check_against_brute_force(*instance)


@given(instances(constraints=1))
def test_highs_keeps_the_limit_exactly(instance: tuple[list[Constraint], Table]) -> None:
    """Also where one solution exceeds it by less than the solver's tolerance."""
    columns, scores = instance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "MAX_STATES", 0)
        if feasible(columns, scores):
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

    def refuse(_: object) -> None:
        raise AssertionError("left to HiGHS")

    monkeypatch.setattr(allocation, "_branch_and_bound", refuse)
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


def test_unfinished_search_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores equal to costs make a subset-sum problem: HiGHS finds good answers, but no proof in a second."""
    monkeypatch.setattr(allocation, "SOLVER_SECONDS", 1.0)
    costs = np.random.default_rng(0).integers(1, 10**9, (60, 25)).astype(float).tolist()
    budget = 0.3 * math.fsum(map(max, costs))
    with pytest.warns(UserWarning, match="not proven optimal; one may score .* more"):
        chosen = allocate(costs, costs, budget)
    assert 0.999 * budget <= total(costs, chosen) <= budget


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
