"""Costs against closed forms, torch's FLOP counter and brute force."""

import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from saq_fx.allocation import allocate_under
from saq_fx.annotation import annotation_of
from saq_fx.cost import (
    CostTable,
    LayerCost,
    budget_constraints,
    cost_table,
    feasible_range,
)
from saq_fx.errors import CheckpointError, InfeasibleBudgetError, PassError, PatternError
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import split_inputs
from saq_fx.precision import Budget, Precision
from saq_fx.prepare import prepare_saq
from saq_fx.recipe import Recipe
from saq_fx.shapes import interpreted
from tests.zoo import ZOO

W2A2, W4A4, W8A8 = (Precision(bits, bits) for bits in (2, 4, 8))
FLOAT = Precision(32, 32)
BITS = (2, 3, 4, 6)


class EmptyOnMeta(TorchFunctionMode):
    """Parameters without memory, so that the largest model is built in no time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def torchvision_model(name: str) -> nn.Module:
    """A classification model on the meta device, in evaluation mode."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with EmptyOnMeta():
        model: nn.Module = torchvision.models.get_model(name, weights=None, **options).to("meta").eval()
    return model


def total_flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


def flops_per_layer(gm: SaqGraphModule, x: Tensor) -> dict[str, int]:
    """FLOPs of each layer of a prepared graph and of its parts, each counted by a counter of its own."""
    flops: dict[str, int] = {}

    def run(part: SaqGraphModule, node: fx.Node, values: Mapping[fx.Node, Any], compute: Callable[[], Any]) -> Any:
        layer = annotation_of(node)
        if layer is None:
            return compute()
        with FlopCounterMode(display=False) as counter:
            result = compute()
        flops[layer.name] = counter.get_total_flops()
        return result

    with interpreted(gm, run):
        gm(x)
    return flops


CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
ONE_A_FAMILY = {
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "vgg11", "vit_b_32", "wide_resnet50_2",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each in ONE_A_FAMILY else pytest.mark.slow) for each in CLASSIFIERS],
)
def test_macs_are_half_of_the_flops_torch_counts_in_torchvision_classifiers(name: str) -> None:
    model = torchvision_model(name)
    x = torch.zeros((1, 3, 299, 299) if name == "inception_v3" else (1, 3, 224, 224), device="meta")
    gm = prepare_saq(model, example_inputs=x, precision=None)
    costs = cost_table(gm)
    assert {layer.name: 2 * layer.macs for layer in costs} == flops_per_layer(gm, x)
    assert 2 * costs.total_macs == total_flops(model, x)


@pytest.mark.parametrize("precision", [None, "W4A4"])
@pytest.mark.parametrize("name", ["residual", "convolutions", "attention", "products", "reparametrized"])
def test_macs_are_half_of_the_flops_torch_counts_layer_by_layer(name: str, precision: str | None) -> None:
    entry = ZOO[name]
    (x,), _ = split_inputs(entry.inputs())
    gm = prepare_saq(entry.make(), example_inputs=x[:1], precision=precision)
    costs, flops = cost_table(gm), flops_per_layer(gm, x[:1])
    assert len(flops) == len(costs) > 0
    assert {layer.name: 2 * layer.macs for layer in costs} == flops


def test_a_batch_costs_what_one_sample_does() -> None:
    for name in ("residual", "convolutions", "attention", "products", "tied"):
        inputs, model = ZOO[name].inputs(), ZOO[name].make()
        whole = cost_table(prepare_saq(model, example_inputs=inputs, precision=None))
        assert whole == cost_table(prepare_saq(model, example_inputs=inputs[:1], precision=None)), name


@pytest.fixture(scope="module")
def resnet18() -> CostTable:
    model = torchvision.models.resnet18(weights=None)
    return cost_table(prepare_saq(model, example_inputs=torch.zeros(1, 3, 224, 224), precision="W4A4"))


def test_resnet18_costs_what_the_authors_report(resnet18: CostTable) -> None:
    assert resnet18.total_macs == 1_814_073_344
    assert resnet18.total_bitops(resnet18.assigned) == 34_714_419_200  # SAQ: 34.7 G
    assert resnet18.total_bitops(resnet18.uniform(W2A2)) == 14_367_850_496  # SAQ: 14.4 G
    assert resnet18.total_bitops(resnet18.uniform(W4A4)) == resnet18.total_bitops(resnet18.assigned)


def test_resnet18_weight_bytes(resnet18: CostTable) -> None:
    conv1, fc, total = 64 * 3 * 7 * 7, 512 * 1000, 11_678_912
    assert resnet18.total_weight_elements == total
    expected = (conv1 + fc) + (total - conv1 - fc) / 2 + 4 * len(resnet18)
    assert resnet18.total_weight_bytes(resnet18.assigned) == expected
    bits = 8 * (conv1 + fc) + 4 * (total - conv1 - fc)
    assert resnet18.average_weight_bits(resnet18.assigned) == bits / total


CONV = LayerCost("conv", "conv2d", "conv", 1000, weight_elements=72, activation_elements=50, quantizer_bytes=4)


def layer(**changes: Any) -> LayerCost:
    return replace(CONV, **changes)


def test_cost_of_one_layer() -> None:
    assert layer().bitops(Precision(3, 5)) == 1000 * 3 * 5
    assert layer().bitops(Precision(3, 32)) == 1000 * 3 * 32
    assert layer().weight_bytes(Precision(3, 5)) == 72 * 3 / 8 + 4
    assert layer().activation_bytes(Precision(3, 5)) == 50 * 5 / 8
    assert layer().weight_bytes(FLOAT) == 72 * 4


def test_a_product_has_the_activation_bits_twice() -> None:
    product = layer(is_product=True, weight_elements=0, quantizer_bytes=0)
    assert product.effective(Precision(2, 6)) == Precision(6, 6)
    assert product.bitops(Precision(2, 6)) == 1000 * 36
    assert product.weight_bytes(Precision(2, 6)) == 0
    assert product.activation_bytes(Precision(2, 6)) == 50 * 6 / 8


@pytest.mark.parametrize(
    ("wanted", "is_product", "has"),
    [
        (Precision(3, 4), False, Precision(3, 8)),
        (Precision(3, 32), False, Precision(3, 8)),
        (Precision(32, 4), False, FLOAT),
        (Precision(3, 4), True, W8A8),
        (Precision(3, 32), True, FLOAT),
    ],
)
def test_the_network_input_has_8_bits_unless_it_meets_float(
    wanted: Precision, is_product: bool, has: Precision
) -> None:
    assert layer(reads_network_input=True, is_product=is_product).effective(wanted) == has


def test_a_weight_is_counted_once_however_many_layers_read_it() -> None:
    for name in ("residual", "tied"):
        model = ZOO[name].make()
        costs = cost_table(prepare_saq(model, example_inputs=ZOO[name].inputs(), precision="W4A4"))
        weights = {id(p): p.numel() for p in model.parameters() if p.dim() > 1}
        assert costs.total_weight_elements == sum(weights.values())
        quantizers = len(weights)
        assert sum(each.quantizer_bytes for each in costs) == 4 * quantizers
        assert [len(group) for group in costs.groups.values()].count(2) == 1


def test_quantizer_bytes_are_those_of_the_levels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).double()
    recipe = Recipe(per_channel=True)
    gm = prepare_saq(model, example_inputs=torch.randn(1, 3, 8, 8).double(), recipe=recipe)
    assert [each.quantizer_bytes for each in cost_table(gm)] == [8 * 8, 5 * 8]


def test_elements_of_attention_are_those_of_both_operands() -> None:
    gm = prepare_saq(ZOO["attention"].make(), example_inputs=torch.randn(1, 5, 6), precision="W4A4")
    scores, mixed = (cost_table(gm)[f"cross_attention.{name}"] for name in ("matmul", "matmul_1"))
    assert scores.activation_elements == 2 * (5 * 8) + 2 * (8 * 5)
    assert mixed.activation_elements == 2 * (5 * 5) + 2 * (5 * 8)
    assert scores.weight_elements == mixed.weight_elements == 0


def test_pins_hold_in_a_uniform_assignment() -> None:
    costs = cost_table(prepare_saq(ZOO["residual"].make(), example_inputs=ZOO["residual"].inputs()))
    assert costs.uniform(W2A2) == {"stem": W8A8, "block": W2A2, "block@1": W2A2, "head": W8A8}


def test_errors_say_what_is_at_fault(resnet18: CostTable) -> None:
    with pytest.raises(PatternError, match=r"no layer 'layer1\.0\.conv3'; the nearest are layer1\.0\.conv"):
        resnet18["layer1.0.conv3"]
    with pytest.raises(PatternError, match="no precision for layer 'conv1'"):
        resnet18.total_bitops({})
    with pytest.raises(PatternError, match="no group 'layer1'"):
        resnet18.choices({"layer1": [W4A4]})
    with pytest.raises(PassError, match="Linear: call prepare_saq first"):
        cost_table(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(PassError, match="prepare with example_inputs"):
        cost_table(prepare_saq(nn.Linear(2, 2)))
    for text in ("{", "[]", '{"format": "saq_fx.cost_table", "version": 2}'):
        with pytest.raises(CheckpointError, match="no cost table"):
            CostTable.from_json(text)
    with pytest.raises(CheckpointError, match="no layer of a cost table"):
        CostTable.from_json('{"format": "saq_fx.cost_table", "version": 1, "layers": [{"name": "conv"}]}')


@st.composite
def tables(draw: st.DrawFn) -> CostTable:
    """One to four layers, some of which share a choice, are products, read the network's input or are pinned."""
    layers: list[LayerCost] = []
    for index in range(draw(st.integers(1, 4))):
        shared = bool(layers) and not layers[-1].is_product and draw(st.booleans())
        is_product = not shared and draw(st.booleans())
        leader = layers[-1] if shared else None
        layers.append(
            LayerCost(
                name=f"layer{index}",
                op="matmul" if is_product else "linear",
                group=leader.group if leader else f"layer{index}",
                macs=draw(st.integers(1, 10**9)),
                weight_elements=0 if shared or is_product else draw(st.integers(1, 10**6)),
                activation_elements=draw(st.integers(1, 10**6)),
                quantizer_bytes=0 if shared or is_product else 4,
                is_product=is_product,
                reads_network_input=index == 0 and draw(st.booleans()),
                module_classes=("Block", "Linear"),
                pinned=leader.pinned if leader else draw(st.sampled_from([None, None, W8A8])),
                precision=draw(st.sampled_from([None, W4A4])),
            )
        )
    return CostTable(tuple(layers))


def candidates(costs: CostTable) -> dict[str, list[Precision]]:
    return {
        group: [Precision(*pair) for pair in itertools.product((2, 3, 6), (2, 4))]
        for group, found in costs.groups.items()
        if found[0].pinned is None
    }


def assignments(costs: CostTable) -> Iterator[tuple[list[int], dict[str, Precision]]]:
    """Every way to choose: an index for each group, and the precision of each layer."""
    choices = costs.choices(candidates(costs))
    for indices in itertools.product(*(range(len(each)) for each in choices.values())):
        chosen = {group: each[index] for (group, each), index in zip(choices.items(), indices, strict=True)}
        yield list(indices), {each.name: chosen[each.group] for each in costs}


@given(tables())
def test_tables_survive_json_and_pickle(costs: CostTable) -> None:
    assert CostTable.from_json(costs.to_json()) == costs
    assert pickle.loads(pickle.dumps(costs)) == costs


def amounts(budget: Budget, costs: CostTable, assignment: dict[str, Precision]) -> list[float]:
    """What an assignment uses, in the unit of the budget."""
    if budget.kind == "weight_bytes":
        return [costs.total_weight_bytes(assignment)]
    if budget.kind == "average_bits":
        return [costs.average_weight_bits(assignment), costs.average_activation_bits(assignment)]
    of = budget.of
    return [costs.total_bitops(assignment) / (1 if of is None else costs.total_bitops(dict.fromkeys(assignment, of)))]


BUDGETS = st.one_of(
    st.floats(1, 1e11).map(Budget.bitops),
    st.floats(0.01, 2).map(Budget.ratio),
    st.floats(1, 10).map(Budget.average_bits),
    st.floats(1, 1e7).map(Budget.weight_bytes),
)


@given(tables(), BUDGETS)
def test_constraints_admit_what_the_budget_does_and_nothing_else(costs: CostTable, budget: Budget) -> None:
    every = list(assignments(costs))
    keeping = [max(amounts(budget, costs, chosen)) <= budget.value * (1 + 1e-12) for _, chosen in every]
    try:
        constraints = budget_constraints(budget, costs, candidates(costs))
    except InfeasibleBudgetError:
        assert not any(keeping)
        return
    admitted = [
        all(
            math.fsum(row[index] for row, index in zip(each.costs, indices, strict=True)) <= each.limit
            for each in constraints
        )
        for indices, _ in every
    ]
    assert admitted == keeping


@given(tables(), BUDGETS)
def test_the_feasible_range_is_what_brute_force_finds(costs: CostTable, budget: Budget) -> None:
    used = [amounts(budget, costs, chosen) for _, chosen in assignments(costs)]
    least, most = feasible_range(budget, costs, candidates(costs))
    # With two averages, the least and the most of each alone.
    columns = list(zip(*used, strict=True))
    assert least == pytest.approx(max(map(min, columns)), rel=1e-12)
    assert most == pytest.approx(max(map(max, columns)), rel=1e-12)
    if least:
        budget_constraints(Budget(budget.kind, least, budget.of), costs, candidates(costs))
        with pytest.raises(InfeasibleBudgetError, match="the smallest feasible one is"):
            budget_constraints(Budget(budget.kind, least * (1 - 1e-9), budget.of), costs, candidates(costs))


def free(costs: CostTable) -> dict[str, list[Precision]]:
    pairs = [Precision(*pair) for pair in itertools.product(BITS, BITS)]
    return {group: pairs for group, found in costs.groups.items() if found[0].pinned is None}


def test_several_budgets_hold_at_once(resnet18: CostTable) -> None:
    constraints = budget_constraints(["25G", Budget.weight_bytes(5e6)], resnet18, free(resnet18))
    assert [(each.limit, each.unit) for each in constraints] == [(25e9, "BitOps"), (5e6, "bytes")]
    choices = resnet18.choices(free(resnet18))
    scores = [[float(each.weight * each.activation) for each in found] for found in choices.values()]
    indices = allocate_under(constraints, scores)
    chosen = {group: found[index] for (group, found), index in zip(choices.items(), indices, strict=True)}
    assignment = {each.name: chosen[each.group] for each in resnet18}
    assert 0.95 * 25e9 < resnet18.total_bitops(assignment) <= 25e9
    assert resnet18.total_weight_bytes(assignment) <= 5e6
    assert assignment["conv1"] == assignment["fc"] == W8A8


def test_an_infeasible_budget_names_the_smallest_in_its_own_unit(resnet18: CostTable) -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"budget 10G: the smallest feasible one is 14\.367850496G$"):
        budget_constraints("10G", resnet18, free(resnet18))
    with pytest.raises(InfeasibleBudgetError, match=r"budget avg2: the smallest feasible one is avg2\.415"):
        budget_constraints("avg2", resnet18, free(resnet18))


def test_a_ratio_is_of_the_number_as_written() -> None:
    costs = CostTable((layer(macs=25),))
    (constraint,) = budget_constraints(Budget.ratio(0.57), costs, {"conv": [W4A4]})
    assert 0.57 * (25 * 64) < constraint.limit == 912


class Starred(nn.Module):
    """Takes any number of tensors, and keywords behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 3) for _ in range(3)])

    def forward(self, *xs: Tensor, scale: float = 1.0) -> Any:
        return sum(head(x) for head, x in zip(self.heads, xs, strict=False)) * scale


def test_keywords_behind_starred_inputs_are_no_inputs() -> None:
    inputs = (torch.randn(2, 4), torch.randn(2, 4))
    table = cost_table(prepare_saq(Starred(), example_inputs=inputs))
    assert {layer.name: layer.macs for layer in table.layers} == {"heads.0": 12, "heads.1": 12, "heads.2": 0}


class Experts(nn.Module):
    """Each token goes to two of four experts, of which none sees a whole sample."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        tokens, output = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = self.gate(tokens).topk(2).indices
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).any(1).nonzero().flatten()
            if len(rows):
                output.index_add_(0, rows, expert(tokens[rows]))
        return output.view_as(x)


class Each(nn.Module):
    """Its own kernel for each sample, in a loop over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([each @ self.kernel(each.mean(0)).view(4, 3) for each in x])


@pytest.mark.parametrize("seed", [0, 1])  # of seed 0 one expert has as many tokens of the first sample as of all
@pytest.mark.parametrize(("kind", "macs"), [(Experts, 5 * 16 + 2 * 5 * 16), (Each, 48 + 5 * 12)])
def test_what_samples_share_out_among_layers_counts_for_one(kind: type[nn.Module], macs: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = kind()
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    for inputs in (x, x[:1]):
        assert cost_table(prepare_saq(model, example_inputs=inputs)).total_macs == macs


@dataclass
class Batch:
    x: Tensor
    scale: Tensor | None = None


class Attending(nn.Module):
    """Attention under a mask that all samples share, of inputs that may be in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, given: Batch | Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.layer(given if isinstance(given, Tensor) else given.x)
        return F.scaled_dot_product_attention(x, x, x, mask)


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5).tril().bool(), torch.zeros(5, 5), torch.zeros(1, 5, 5)])
@pytest.mark.parametrize("kind", [lambda x: x, Batch])
def test_a_batch_is_found_beside_masks_and_in_objects(kind: Callable[[Tensor], Any], mask: Tensor | None) -> None:
    inputs = (kind(torch.randn(3, 5, 4)), *(() if mask is None else (mask,)))
    assert cost_table(prepare_saq(Attending(), example_inputs=inputs)).total_macs == 5 * 16 + 2 * 5 * 5 * 4
