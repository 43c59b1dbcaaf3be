"""One search serves every budget: the policy is within it, exact, and comes back from its file."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import saq_fx
from saq_fx import Budget, Policy, Precision, cost_table, prepare_saq, search_precision
from saq_fx.baselines import best_uniform, draw_random, measure_sensitivity
from saq_fx.cost import CostTable, feasible_range
from saq_fx.errors import CheckpointError, InfeasibleBudgetError, PatternError, PrecisionError, TrainingError
from saq_fx.graph import layers
from saq_fx.inputs import split_inputs
from saq_fx.networks import SmallResNet
from saq_fx.passes.relax_precision import RelaxPrecision
from saq_fx.recipe import Recipe
from saq_fx.search import SearchResult
from tests.test_prepare import tensors
from tests.zoo import ZOO

CANDIDATES = (2, 3, 4, 6)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(4)]


@pytest.fixture(scope="module")
def gm() -> saq_fx.graph.SaqGraphModule:
    torch.manual_seed(0)
    return prepare_saq(SmallResNet(4), example_inputs=torch.randn(8, 1, 8, 8))


@pytest.fixture(scope="module")
def result(gm: Any) -> SearchResult:
    torch.manual_seed(0)
    return search_precision(gm, batches(), F.cross_entropy, budget="0.14xW8A8", candidates=CANDIDATES, steps=6)


def total_bitops(result: SearchResult, policy: Policy) -> int:
    return result.costs.total_bitops(dict(policy))


@pytest.mark.parametrize("share", [0.11, 0.12, 0.14, 0.2, 0.3, 0.5])
def test_a_budget_is_never_exceeded_and_the_score_is_the_best(result: SearchResult, share: float) -> None:
    budget = Budget.ratio(share)
    policy = result.policy_for(budget)
    limit = share * result.costs.total_bitops(result.costs.uniform(Precision(8, 8)))
    assert total_bitops(result, policy) <= limit
    assert set(policy) == {layer.name for layer in result.costs}

    few = replace(result, choices=tuple(replace(c, **best_two(c)) for c in result.choices))
    scores = [dict(zip(c.precisions, c.scores, strict=True)) for c in few.choices]
    chosen = few.policy_for(Budget.ratio(0.5))
    best = max(
        sum(score[p] for score, p in zip(scores, picks, strict=True))
        for picks in product(*(c.precisions for c in few.choices))
        if cost_of(few, picks) <= 0.5 * few.costs.total_bitops(few.costs.uniform(Precision(8, 8)))
    )
    assert sum(score[chosen[c.layers[0]]] for score, c in zip(scores, few.choices, strict=True)) == pytest.approx(best)


def best_two(choice: Any) -> dict[str, Any]:
    order = [0, max(range(len(choice.scores)), key=choice.scores.__getitem__)]
    kept = sorted(set(order))
    return {
        "precisions": tuple(choice.precisions[i] for i in kept),
        "scores": tuple(choice.scores[i] for i in kept),
    }


def cost_of(result: SearchResult, picks: Any) -> int:
    chosen = {c.layers[0]: p for c, p in zip(result.choices, picks, strict=True)}
    return result.costs.total_bitops(result.costs.uniform(Precision(8, 8)) | chosen)


def test_the_graph_is_not_changed(gm: Any, result: SearchResult) -> None:
    assert all(str(layer.precision) == ("W8A8" if layer.pinned else "W4A4") for _, layer in layers(gm))
    assert len(result.history) == 6
    assert set(result.margins) == {layer.name for _, layer in layers(gm) if layer.pinned is None}
    saq_fx.apply_policy(gm, result.policy)
    assert saq_fx.policy_of(gm) == result.policy
    saq_fx.apply_policy(gm, "W4A4")


def test_every_step_is_reported_as_it_is_kept(gm: Any) -> None:
    seen: list[Any] = []
    found = search_precision(gm, batches(), F.cross_entropy, budget="0.2xW8A8", steps=2, after_step=seen.append)
    assert tuple(seen) == found.history
    for name, bits in seen[0].bits.items():
        weights = torch.tensor(seen[0].logits[name]).softmax(0)
        assert bits == pytest.approx(float(weights @ torch.tensor(CANDIDATES, dtype=torch.float)))


def test_an_infeasible_budget_is_refused_before_any_training(gm: Any) -> None:
    def never(outputs: Tensor, targets: Tensor) -> Tensor:
        raise AssertionError("trained")

    least, _ = feasible_range(Budget.bitops(1), cost_table(gm), {c: [Precision(2, 2)] for c in free_groups(gm)})
    with pytest.raises(InfeasibleBudgetError, match=f"smallest feasible one is {Budget.bitops(least)}"):
        search_precision(gm, batches(), never, budget=Budget.bitops(least - 1))


def free_groups(gm: Any) -> list[str]:
    return [layer.choice_group for _, layer in layers(gm) if layer.pinned is None]


def test_several_budgets_at_once(result: SearchResult) -> None:
    policy = result.policy_for(["0.2xW8A8", "avg3.2", "9kB"])
    assignment = dict(policy)
    assert result.costs.average_weight_bits(assignment) <= 3.2
    assert result.costs.average_activation_bits(assignment) <= 3.2
    assert result.costs.total_weight_bytes(assignment) <= 9000


def test_round_trip(result: SearchResult, tmp_path: Path) -> None:
    result.save(tmp_path / "search.json")
    loaded = SearchResult.load(tmp_path / "search.json")
    assert loaded == result
    assert loaded.policy == result.policy
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a search result"):
        SearchResult.load(tmp_path / "search.json")


def test_frontier_rises_and_keeps_its_costs(result: SearchResult) -> None:
    points = result.frontier()
    assert all(a.bitops < b.bitops and a.score < b.score for a, b in pairwise(points))
    for point in points:
        assert total_bitops(result, point.policy) == point.bitops
    best = sum(max(choice.scores) for choice in result.choices)
    assert points[-1].score == pytest.approx(best)


def test_margins_are_what_another_choice_costs(result: SearchResult) -> None:
    few = replace(result, choices=tuple(replace(choice, **best_two(choice)) for choice in result.choices))
    scores = [dict(zip(choice.precisions, choice.scores, strict=True)) for choice in few.choices]
    limit = 0.14 * few.costs.total_bitops(few.costs.uniform(Precision(8, 8)))
    totals = {
        picks: sum(score[pick] for score, pick in zip(scores, picks, strict=True))
        for picks in product(*(choice.precisions for choice in few.choices))
        if cost_of(few, picks) <= limit
    }
    best = max(totals, key=totals.__getitem__)
    for index, choice in enumerate(few.choices):
        second = max((total for picks, total in totals.items() if picks[index] != best[index]), default=-math.inf)
        assert few.margins[choice.group] == pytest.approx(totals[best] - second)


def test_feasible_budgets_are_the_ends(result: SearchResult) -> None:
    ((least, most),) = result.feasible_budgets()
    assert set(result.policy_for(least).values()) == {Precision(2, 2), Precision(8, 8)}
    assert total_bitops(result, result.policy_for(most)) <= total_bitops(
        result, Policy(result.costs.uniform(Precision(6, 6)))
    )
    with pytest.raises(InfeasibleBudgetError):
        result.policy_for(replace(least, value=least.value * (1 - 1e-12)))


def test_sensitivity_is_the_loss_that_one_width_costs(gm: Any) -> None:
    data = batches()[:1]
    inputs, targets = data[0]
    found = measure_sensitivity(gm, data, F.cross_entropy, budget="0.2xW8A8", candidates={"weight": (2, 4, 5)})
    widest = copy.deepcopy(gm).eval()
    saq_fx.apply_policy(widest, "W5A6")

    def loss(of: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(of(inputs), targets))

    base = loss(widest)
    for choice in found.choices[:2]:
        for precision, score in zip(choice.precisions, choice.scores, strict=True):
            alone = []
            for pair in (replace(precision, activation=6), replace(precision, weight=5)):
                one = copy.deepcopy(widest)
                saq_fx.apply_policy(one, Policy({choice.group: pair}))
                alone.append(base - loss(one))
            assert score == pytest.approx(sum(alone), abs=1e-5)


def test_another_network_of_the_same_layers(result: SearchResult) -> None:
    larger = cost_table(prepare_saq(SmallResNet(4, classes=7), example_inputs=torch.randn(1, 1, 16, 16)))
    policy = result.policy_for("0.11xW8A8", costs=larger)
    limit = 0.11 * larger.total_bitops(larger.uniform(Precision(8, 8)))
    assert larger.total_bitops(dict(policy)) <= limit < larger.total_bitops(dict(result.policy))
    other = cost_table(
        prepare_saq(
            nn.Sequential(*[nn.Linear(4, 4)] * 1, nn.Linear(4, 4), nn.Linear(4, 4)), example_inputs=torch.randn(1, 4)
        )
    )
    with pytest.raises(PatternError, match="scored no layers 1"):
        result.policy_for("0.5xW8A8", costs=other)


@pytest.mark.parametrize("name", ZOO)
def test_a_hard_budget_is_met_on_every_network(name: str) -> None:
    inputs = ZOO[name].inputs()
    gm = prepare_saq(ZOO[name].make(), example_inputs=inputs)

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return torch.stack([each.square().mean() for each in tensors(outputs)]).sum()

    if not free_groups(gm):
        with pytest.raises(PrecisionError, match="nothing to search"):
            search_precision(gm, [(inputs, None)], loss, budget="avg4", steps=1)
        return
    found = search_precision(gm, [(inputs, None)], loss, budget="0.99xW8A8", steps=2)
    candidates = {choice.group: choice.precisions for choice in found.choices}
    least, most = feasible_range(Budget.bitops(1), found.costs, candidates)
    for part in (0.0, 0.3, 0.7, 1.0):
        limit = least + part * (most - least)
        policy = found.policy_for(Budget.bitops(limit))
        assert found.costs.total_bitops(dict(policy)) <= limit
        saq_fx.apply_policy(gm, policy)
        args, kwargs = split_inputs(inputs)
        assert all(torch.isfinite(each).all() for each in tensors(gm(*args, **kwargs)))


def test_bad_arguments_are_named(gm: Any) -> None:
    with pytest.raises(PatternError, match="'wieght' matches no layer that has a choice"):
        search_precision(gm, batches(), F.cross_entropy, budget="avg4", candidates={"wieght": (2, 4)})
    with pytest.raises(TrainingError, match="ran out after 4 of 5 steps"):
        search_precision(gm, iter(batches()), F.cross_entropy, budget="avg4", steps=5)
    with pytest.raises(TrainingError, match=r"pairs \(inputs, targets\), not Tensor"):
        search_precision(gm, [torch.randn(2, 3)], F.cross_entropy, budget="avg4")
    with pytest.raises(TrainingError, match=r"pairs \(inputs, targets\), not 3 of them"):
        measure_sensitivity(gm, [(torch.randn(2, 3),) * 3], F.cross_entropy, budget="avg4")
    with pytest.raises(TrainingError, match="there are none"):
        measure_sensitivity(gm, [], F.cross_entropy, budget="avg4")
    for candidates in (4, "24", {"weight": 4}, (2, 2.5)):
        with pytest.raises(PrecisionError, match="different widths of 2 to 8 bits"):
            search_precision(gm, batches(), F.cross_entropy, budget="avg4", candidates=candidates)
    for budget in (None, 5):
        with pytest.raises(PrecisionError, match="is no budget"):
            search_precision(gm, batches(), F.cross_entropy, budget=budget)
    with pytest.raises(PrecisionError, match="every layer is pinned"):
        best_uniform(prepare_saq(nn.Linear(4, 4), example_inputs=torch.randn(2, 4)), budget="avg8")


def test_margins_of_a_choice_whose_first_layer_reads_the_input() -> None:
    gm = prepare_saq(SmallResNet(4), example_inputs=torch.randn(8, 1, 8, 8), recipe=Recipe(first_last=None))
    space = RelaxPrecision((2, 4), (2, 4), same_bits=[("stem", "block1.conv1")])
    found = search_precision(gm, batches(), F.cross_entropy, budget="0.1xW8A8", candidates=space, steps=1)
    (choice,) = (each for each in found.choices if "stem" in each.layers)
    chosen = choice.precisions.index(found.policy["block1.conv1"])
    others = [score for index, score in enumerate(choice.scores) if index != chosen]
    plenty = replace(found, budgets=(Budget.ratio(1.0),))
    assert plenty.margins["stem"] == pytest.approx(max(choice.scores) - sorted(choice.scores)[-2])
    assert (len(others), set(found.margins)) == (3, {layer.name for layer in found.costs})


def test_a_pin_of_the_target_frees_the_others_of_its_choice(gm: Any) -> None:
    space = RelaxPrecision(same_bits=["block1.*"])
    found = search_precision(gm, batches(), F.cross_entropy, budget="0.3xW8A8", candidates=space, steps=2)
    for pinned, free in (("block1.conv1", "block1.conv2"), ("block1.conv2", "block1.conv1")):
        for order in (1, -1):
            layers_ = [
                replace(each, pinned=Precision(8, 8)) if each.name == pinned else each for each in cost_table(gm).layers
            ]
            policy = found.policy_for("0.4xW8A8", costs=CostTable(tuple(layers_[::order])))
            assert policy[pinned] == Precision(8, 8)
            assert policy[free].weight in CANDIDATES


def test_shared_choices_hold_in_every_policy(gm: Any) -> None:
    relaxed = RelaxPrecision(same_bits=["block1.*", "*.shortcut.*"], equal_operands=["block2.*"])
    found = search_precision(gm, batches(), F.cross_entropy, budget="0.2xW8A8", candidates=relaxed, steps=2)
    larger = cost_table(prepare_saq(SmallResNet(4), example_inputs=torch.randn(1, 1, 16, 16)))
    for policy in (found.policy, found.policy_for("0.15xW8A8", costs=larger), found.frontier()[1].policy):
        assert policy["block1.conv1"] == policy["block1.conv2"]
        assert policy["block2.shortcut.0"] == policy["block3.shortcut.0"]
        for name in ("block2.conv1", "block2.conv2", "block2.shortcut.0"):
            assert policy[name].weight == policy[name].activation
    assert larger.total_bitops(dict(found.policy_for("0.15xW8A8", costs=larger))) <= 0.15 * larger.total_bitops(
        larger.uniform(Precision(8, 8))
    )


def test_a_price_alone_decides_what_the_bits_are_worth(gm: Any) -> None:
    totals = []
    for beta in (1e-3, 1e3):
        found = search_precision(gm, batches(), F.cross_entropy, steps=4, beta=beta)
        (budget,) = found.budgets
        assert budget.value == total_bitops(found, found.policy)
        best = [choice.precisions[max(range(16), key=choice.scores.__getitem__)] for choice in found.choices]
        assert [found.policy[choice.group] for choice in found.choices] == best
        totals.append(budget.value)
    assert (
        totals[0]
        > totals[1]
        == total_bitops(found, Policy({layer.name: layer.pinned or "W2A2" for layer in found.costs}))
    )
    with pytest.raises(PrecisionError, match="at least one budget, or a price"):
        search_precision(gm, batches(), F.cross_entropy)


def test_the_best_uniform_policy_uses_most_of_the_budget(gm: Any) -> None:
    found = best_uniform(gm, budget="0.15xW8A8")
    free = {precision for name, precision in found.policy.items() if found.costs[name].pinned is None}
    costs = found.costs
    limit = 0.15 * costs.total_bitops(costs.uniform(Precision(8, 8)))
    every = [costs.total_bitops(costs.uniform(Precision(*pair))) for pair in product(CANDIDATES, CANDIDATES)]
    assert len(free) == 1
    assert total_bitops(found, found.policy) == max(total for total in every if total <= limit)


def test_random_policies_differ_and_use_the_budget(gm: Any) -> None:
    found = [draw_random(gm, budget="0.15xW8A8", seed=seed) for seed in (0, 0, 1)]
    assert found[0].policy == found[1].policy != found[2].policy
    limit = 0.15 * found[0].costs.total_bitops(found[0].costs.uniform(Precision(8, 8)))
    assert all(0.9 * limit < total_bitops(each, each.policy) <= limit for each in found)


@pytest.mark.parametrize("budget", ["0.12xW8A8", "0.3xW8A8", "0.45xW8A8", "2kB", ["0.3xW8A8", "2kB"]])
def test_random_policies_use_any_budget(gm: Any, budget: Any) -> None:
    found = [draw_random(gm, budget=budget, seed=seed) for seed in range(5)]
    assert all(0.95 <= each.budget_used <= 1 for each in found)
    assert len({str(dict(each.policy)) for each in found}) == 5


def test_policies_found_by_others_can_be_loaded(gm: Any, tmp_path: Path) -> None:
    text = {"format": "saq_fx.policy", "version": 1, "default": "W4A4", "layers": {"block1.*": "W2A3"}}
    (tmp_path / "policy.json").write_text(json.dumps(text))
    applied = copy.deepcopy(gm)
    saq_fx.apply_policy(applied, Policy.load(tmp_path / "policy.json"))
    bits = saq_fx.policy_of(applied)
    assert (str(bits["block1.conv1"]), str(bits["block2.conv1"]), str(bits["stem"])) == ("W2A3", "W4A4", "W8A8")


SHARES = st.floats(0, 1)


@given(st.lists(SHARES, min_size=1, max_size=3))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_feasible_budget_of_any_kind_is_kept(result: SearchResult, shares: list[float]) -> None:
    """The larger of random budgets of several kinds, between their ends."""
    candidates = {choice.group: choice.precisions for choice in result.choices}
    kinds = (Budget.bitops(1), Budget.weight_bytes(1), Budget.average_bits(1))
    budgets = []
    for kind, share in zip(kinds, shares, strict=False):
        least, most = feasible_range(kind, result.costs, candidates)
        budgets.append(replace(kind, value=least + share * (most - least)))
    bits = dict(result.policy_for(budgets))
    measured = {
        "bitops": result.costs.total_bitops(bits),
        "weight_bytes": result.costs.total_weight_bytes(bits),
        "average_bits": max(result.costs.average_weight_bits(bits), result.costs.average_activation_bits(bits)),
    }
    for budget in budgets:
        assert measured[budget.kind] <= budget.value


def test_a_budget_beyond_all_numbers_limits_nothing(gm: Any) -> None:
    widest = draw_random(gm, budget="avg8").policy
    for budget in ("avg1e308", "1e308xW8A8", "1e308"):
        assert draw_random(gm, budget=budget).policy == widest
