"""Where the leaves go in each case, what they add, and that nothing else of the graph changes."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.annotation import record_of
from saq_fx.errors import PassError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.pass_base import Pass, Pipeline
from saq_fx.passes.insert_perturbations import (
    InsertPerturbations,
    RemovePerturbations,
    perturbed_weights,
    zero_deltas,
)
from saq_fx.prepare import prepare_saq
from saq_fx.sharpness import Perturbation, lambda_max
from saq_fx.training import SAQ


class StandardizedConv2d(nn.Conv2d):
    """A convolution whose weight is an expression of two parameters."""

    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(2, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, self.gain * centred, self.bias, padding=1)


class Network(nn.Module):
    """A standardised convolution, a layer called twice, tied weights and a product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.standardized = StandardizedConv2d()
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.twice.weight
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standardized(self.first(x).relu()).flatten(2).transpose(1, 2)
        x = F.pad(x, (0, 4))
        x = self.tied(self.twice(self.twice(x).relu()).relu())
        scores: Tensor = x @ x.transpose(1, 2)
        return self.last((scores.softmax(-1) @ x).mean(1))


def prepared(precision: str | None = "W3A3") -> SaqGraphModule:
    return prepare_saq(Network().double(), example_inputs=inputs(), precision=precision)


def inputs() -> Tensor:
    return torch.randn(2, 1, 4, 4, dtype=torch.float64)


def run(pass_: Pass, gm: SaqGraphModule) -> bool:
    return Pipeline((pass_,)).run(gm).modified


def leaves(gm: SaqGraphModule) -> dict[str, Perturbation]:
    return {path: module for path, module in gm.named_modules() if isinstance(module, Perturbation)}


def sides(gm: SaqGraphModule) -> set[tuple[str, str]]:
    """(weight quantizer, side of it) of every leaf, read off the data flow."""
    found = set()
    for node in gm.graph.nodes:
        if node.target in leaves(gm):
            (source,) = node.all_input_nodes
            users = [str(user.target) for user in node.users]
            if str(source.target).endswith("quantizer"):
                found.add((str(source.target), "after"))
            else:
                found.add((users[0], "before"))
    return found


def calls(gm: SaqGraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in gm.graph.nodes]


def weight_quantizers(gm: SaqGraphModule) -> set[str]:
    return {str(layer.weight_quantizer) for _, layer in layers(gm) if not layer.is_product}


@pytest.mark.parametrize(("case", "expected"), [(1, {"before", "after"}), (2, {"before"}), (3, {"after"})])
def test_each_weight_quantizer_has_the_leaves_of_the_case(case: int, expected: set[str]) -> None:
    gm = prepared()
    quantizers = weight_quantizers(gm)
    assert len(quantizers) == 4  # first, standardized, twice = tied, last
    assert run(InsertPerturbations(case), gm)
    assert sides(gm) == {(quantizer, side) for quantizer in quantizers for side in expected}
    assert record_of(gm).perturbation_case == case


@pytest.mark.parametrize("case", [1, 2, 3])
def test_without_deltas_nothing_changes(case: int) -> None:
    gm, x = prepared(), inputs()
    before, state = gm(x), gm.state_dict()
    run(InsertPerturbations(case), gm)
    assert torch.equal(gm(x), before)
    assert gm.state_dict().keys() == state.keys()
    assert [layer.name for _, layer in layers(gm)] == [layer.name for _, layer in layers(prepared())]


def test_modified_is_honest_and_cases_move_the_leaves() -> None:
    gm, plain = prepared(), prepared()
    for case in (3, 1, 2):
        assert run(InsertPerturbations(case), gm)
        code = gm.code
        assert not run(InsertPerturbations(case), gm)
        assert gm.code == code
        fresh = prepared()
        run(InsertPerturbations(case), fresh)
        assert calls(gm) == calls(fresh)
    assert run(RemovePerturbations(), gm)
    assert calls(gm) == calls(plain)
    assert not leaves(gm)
    assert not run(RemovePerturbations(), gm)


def test_an_unquantized_graph_gets_a_record_and_no_leaves() -> None:
    gm = prepared(precision=None)
    code = gm.code
    assert run(InsertPerturbations(), gm)
    assert not run(InsertPerturbations(), gm)
    assert gm.code == code
    assert record_of(gm).perturbation_case == 3
    assert perturbed_weights(gm) == []
    assert run(RemovePerturbations(), gm)
    assert not run(RemovePerturbations(), gm)


@pytest.mark.parametrize("case", [2, 3])
def test_a_delta_is_added_on_its_side_of_the_quantizer(case: int) -> None:
    gm = prepared()
    run(InsertPerturbations(case), gm)
    last, delta = gm.get_submodule("last"), torch.randn(3, 6, dtype=torch.float64)
    weight, quantizer = last.get_parameter("weight"), last.get_submodule("weight_quantizer")
    leaf = last.get_submodule(f"weight_quantizer_delta_{'after' if case == 3 else 'before'}")
    seen = []
    (leaf if case == 3 else quantizer).register_forward_hook(lambda *call: seen.append(call[-1]))
    leaf.delta = delta  # type: ignore[assignment]
    gm(inputs())
    expected = quantizer(weight) + delta if case == 3 else quantizer(weight + delta)
    assert torch.equal(seen[0], expected)


def test_parameters_behind_a_weight_are_all_found() -> None:
    gm = prepared()
    run(InsertPerturbations(), gm)
    names = {parameter: name for name, parameter in gm.named_parameters()}
    found = [({names[p] for p in weight.parameters}, tuple(weight.shape)) for weight in perturbed_weights(gm)]
    assert found == [
        ({"first.weight"}, (2, 1, 3, 3)),
        ({"standardized.weight", "standardized.gain"}, (2, 2, 3, 3)),
        ({"twice.weight"}, (6, 6)),
        ({"last.weight"}, (3, 6)),
    ]


def test_leaves_collect_the_gradient_of_the_quantized_weight_and_are_taken_away() -> None:
    """Finite differences of the loss in one element of the (linear) last layer's quantized weight."""
    gm, x = prepared(), inputs()
    run(InsertPerturbations(), gm)
    weights = perturbed_weights(gm)

    def loss() -> Tensor:
        value: Tensor = gm(x).square().sum()
        return value

    with zero_deltas(weights) as pairs:
        source, delta = pairs[-1]
        assert source is delta
        loss().backward()
        assert source.grad is not None
        gradient = source.grad[1, 2].clone()
        values = []
        for step in (-1e-4, 1e-4):
            with torch.no_grad():
                delta[1, 2] = step
            values.append(float(loss().detach()))
    assert float(gradient) == pytest.approx((values[1] - values[0]) / 2e-4, rel=1e-7)
    assert all(leaf.delta is None for leaf in leaves(gm).values())


def test_sharpness_with_respect_to_quantized_weights() -> None:
    """For a mean squared error of x Q(W)' the Hessian in each row of Q(W) is 2 x'x/numel."""
    x, target = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    gm = prepare_saq(nn.Linear(5, 2).double(), example_inputs=x, precision="W2A2")
    run(InsertPerturbations(), gm)
    with zero_deltas(perturbed_weights(gm)) as pairs:
        deltas = [delta for _, delta in pairs]
        found = lambda_max(lambda _: F.mse_loss(gm(x), target), [0], deltas, iterations=1000, tolerance=1e-8)
    expected = torch.linalg.eigvalsh(2 * x.T @ x / target.numel())[-1]
    assert found.value == pytest.approx(float(expected), rel=1e-10)


def test_leaves_are_taken_away_after_an_error() -> None:
    gm = prepared()
    run(InsertPerturbations(1), gm)

    def fail() -> None:
        with zero_deltas(perturbed_weights(gm)) as pairs:
            assert all(source is not delta for source, delta in pairs)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(leaf.delta is None for leaf in leaves(gm).values())


def test_copies_of_a_module_leave_its_deltas_behind() -> None:
    gm, x = prepared(), inputs()
    run(InsertPerturbations(), gm)
    before = gm(x)
    with zero_deltas(perturbed_weights(gm)) as pairs:
        with torch.no_grad():
            pairs[-1][1].fill_(1.0)
        assert not torch.equal(gm(x), before)
        for other in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
            assert torch.equal(other(x), before)
            assert not run(InsertPerturbations(), other)
            assert len(perturbed_weights(other)) == len(pairs)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(PassError, match="no perturbation case 4"):
        InsertPerturbations(4)
    with pytest.raises(PassError, match="perturbation leaves"):
        perturbed_weights(prepared())


class Queries(nn.Module):
    """Learned queries, one set for each sample, meet keys that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.repeat(x.shape[0], 1, 1)
        return self.head((queries @ self.keys(x).transpose(1, 2)).softmax(-1) @ x)


@pytest.mark.parametrize("case", [1, 2, 3])
def test_weights_that_sizes_of_inputs_shape_are_perturbed_in_place(case: int) -> None:
    gm = prepare_saq(Queries(), example_inputs=torch.randn(2, 5, 4))
    run(InsertPerturbations(case), gm)
    names = {parameter: name for name, parameter in gm.named_parameters()}
    assert [names[weight.parameters[0]] for weight in perturbed_weights(gm)] == ["keys.weight", "head.weight"]
    optimizer = SAQ(gm, torch.optim.SGD(gm.parameters(), 0.1), case=case, period=1)
    before = gm.get_parameter("queries").clone()
    for samples in (2, 3):
        assert torch.isfinite(optimizer.step(lambda: gm(torch.randn(samples, 5, 4)).square().mean()))  # noqa: B023
    assert not torch.equal(gm.get_parameter("queries"), before)
