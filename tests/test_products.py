"""Products that code computes which stays Python: each is a layer with quantizers, and the function stays the same."""

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.annotation import record_of
from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from saq_fx.report import precision_report
from saq_fx.training import SAQ
from tests.test_hostile import assert_same


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


class Products(nn.Module):
    """Every way to name a product, helpers among them, next to control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.uncalled = nn.Linear(6, 6), nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > -1e9:
            x = weighted(x, self.weight) + weighted(x, self.uncalled.weight)
        scores = (x @ x.transpose(-2, -1)).softmax(-1)
        x = scores.matmul(x) + torch.einsum("btc,cd->btd", x, self.weight)
        x = F.scaled_dot_product_attention(x, x, value=x, is_causal=True)
        for _ in range(2):
            x = torch.baddbmm(x, x, self.weight.expand(len(x), 6, 6), beta=0.5)
        return x @ self.weight.t()


class Chosen(nn.Module):
    """A mixture of experts whose weights are slices of one parameter; who gets what, values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.Parameter(torch.randn(3, 6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        output = torch.zeros_like(x)
        for expert in range(3):
            batch, token = torch.where(chosen == expert)
            if len(batch):
                output[batch, token] = F.linear(x[batch, token], self.experts[expert]).relu()
        return output


class Within(nn.Module):
    """Such code below a traced one, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = nn.Linear(6, 6), Products(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.inner(self.stem(x))))


OWN = {"first", "linear", "uncalled", "matmul", "matmul_1", "einsum", "baddbmm", "matmul_2"}
NAMES: dict[Callable[[], nn.Module], set[str]] = {
    Products: OWN,
    Chosen: {"router", "linear"},
    Within: {"stem", "head", *(f"inner.{name}" for name in OWN)},
}


@pytest.mark.parametrize("make", NAMES)
def test_the_function_stays_the_same(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(2, 5, 6)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert record_of(gm).tracing == "by parts"
    assert list(gm.state_dict()) == list(model.state_dict())
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for inputs in (x, torch.randn(3, 4, 6)):
            for training in (False, True):
                assert_same(model.train(training), each.train(training), inputs)


@pytest.mark.parametrize("make", NAMES)
def test_products_are_quantized_trained_and_copied(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(2, 5, 6)
    gm = prepare_saq(model, example_inputs=x)
    names = {layer.name for _, layer in layers(gm)}
    opened = {name for name in names if "scaled_dot_product_attention" in name}
    assert names - opened == NAMES[make]
    assert len(opened) == (0 if make is Chosen else 2)
    assert precision_report(gm).quantized_share == 1
    optimizer = SAQ(gm.train(), torch.optim.SGD(gm.parameters(), 0.01), period=2)
    for _ in range(4):
        assert torch.isfinite(optimizer.step(lambda: gm(x).square().sum()))
    expected = gm.eval()(x)
    for each in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(each(x), expected)
        each.load_state_dict(gm.state_dict())
    again = prepare_saq(model, example_inputs=x)
    again.load_state_dict(gm.state_dict())
    assert torch.equal(again.eval()(x), expected)


def test_the_quantized_product_is_what_its_operands_make() -> None:
    """A linear layer by function, of a weight of the module's own: the quantized operands, multiplied."""
    model, x = Inline(), torch.randn(3, 6)
    gm = prepare_saq(model, example_inputs=x, precision="W3A2")
    linear = gm.get_submodule("linear")
    assert torch.equal(gm(x), F.linear(x, linear.weight_quantizer(gm.weight)))  # the network's input is not quantized


class Inline(nn.Module):
    """One product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y if y.sum() < 1e9 else -y


def test_macs_are_those_of_all_calls() -> None:
    """Five tokens of six channels; two steps of the loop; attention and scores over five tokens."""
    gm = prepare_saq(Products(), example_inputs=torch.randn(1, 5, 6), precision=None)
    macs = {layer.name: layer.macs for _, layer in layers(gm)}
    expected = dict.fromkeys(("first", "linear", "uncalled", "einsum", "matmul_2"), 5 * 36)
    expected |= {"matmul": 150, "matmul_1": 150, "baddbmm": 2 * 5 * 36, "scaled_dot_product_attention": 300}
    assert macs == expected


class Forked(nn.Module):
    """Which of two weights it multiplies, and where, the values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x.mean() > 1)]
        x = F.linear(self.first(x), expert.weight)
        return x @ x.transpose(-2, -1) if x.shape[1] > 5 and x.abs().sum() < 0 else x


def test_a_product_that_the_example_did_not_reach_is_told() -> None:
    model = Forked().eval()
    gm = prepare_saq(model, example_inputs=torch.zeros(2, 5, 6), precision=None)
    assert torch.equal(gm(torch.ones(2, 5, 6)), model(torch.ones(2, 5, 6)))
    line = rf"{__file__}:{inspect.getsourcelines(Forked)[1] + 10}"
    with pytest.warns(UserWarning, match=rf"Forked calls linear at {line} as it did not on the example"):
        output = gm(torch.full((2, 5, 6), 2.0))
    assert torch.equal(output, model(torch.full((2, 5, 6), 2.0)))


class Dropping(nn.Module):
    """Attention that drops in training alone, by another argument, and torch's attention with weights of its own."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        if self.asks and x.sum() < -1e9:
            return x
        q, k, v = self.q(x), self.k(x), self.v(x)
        h = x + F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0)
        h, _ = F.multi_head_attention_forward(
            h.transpose(0, 1), h.transpose(0, 1), h.transpose(0, 1), 6, 2, torch.empty(0),
            torch.cat((self.q.bias, self.k.bias, self.v.bias)), None, None, False, 0.5, self.out.weight,
            self.out.bias, self.training, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return h.transpose(0, 1)


def test_attention_has_one_set_of_quantizers_in_both_modes() -> None:
    model, x = Dropping(asks=True), torch.randn(2, 3, 6)
    assert_same(model, prepare_saq(model, example_inputs=x, precision=None), x)
    gm, traced = prepare_saq(model, example_inputs=x), prepare_saq(Dropping(asks=False), example_inputs=x)
    report, expected = precision_report(gm), precision_report(traced)
    assert [row.macs for row in report.rows] == [row.macs for row in expected.rows]
    assert report.uncounted == ()
    assert len({row.name for row in report.rows}) == len(report.rows)
    for training in (False, True):
        gm.zero_grad()
        gm.train(training)(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in gm.parameters())


class Masked(nn.Module):
    """Spreads a mask by a product, as attention in windows does; `asks` keeps it Python."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.a, self.asks = nn.Linear(6, 6), asks

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.asks and h.sum() < -1e9:
            return h
        mask = torch.where(x[:, :, :1] > 0, torch.finfo(h.dtype).min, 0.0)
        scores = h @ h.transpose(1, 2) + torch.ones_like(mask) @ mask.transpose(1, 2)
        return scores.softmax(-1) @ h


@pytest.mark.parametrize("asks", [False, True])
def test_products_of_infinite_masks_stay_in_float(asks: bool) -> None:
    x = torch.randn(2, 3, 6)
    gm = prepare_saq(Masked(asks), example_inputs=x)
    report = precision_report(gm)
    assert [reason for _, reason in report.uncounted] == ["infinite mask operands are not quantized"]
    assert report.quantized_share == (108 + 2 * 54) / (108 + 2 * 54 + 9)
    output = gm.train()(x)
    output.square().sum().backward()
    assert all(each.isfinite().all() for each in (output, *(p.grad for p in gm.parameters() if p.grad is not None)))


class Recalling(nn.Module):
    """Adds what it computed last, which must have the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight
        if self.last is not None:
            x = torch.stack((x, self.last)).sum(0)
        self.last = x.detach()
        return x


class Asking(nn.Module):
    """Asks for the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.recalling = nn.Linear(6, 6), Recalling()

    def forward(self, x: Tensor) -> Tensor:
        return self.recalling(self.first(x.flip(1) if x.shape[0] == 1 else x))


def test_a_state_of_python_code_does_not_meet_inputs_of_other_sizes() -> None:
    report = precision_report(prepare_saq(Asking(), example_inputs=torch.randn(2, 6)))
    assert report.uncounted == ()
    assert [row.name for row in report.rows] == ["first", "recalling"]
