"""Code that stays Python finds the modules that it calls as they were: their class, methods, items and attributes."""

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from saq_fx.annotation import record_of
from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from saq_fx.report import precision_report
from saq_fx.training import SAQ
from tests.test_hostile import assert_same
from tests.test_prepare import assert_same_function


class Scaled(nn.Linear):
    factor = 2.0

    def scale(self) -> float:
        return self.factor * self.in_features

    @property
    def total(self) -> Tensor:
        return self.weight.sum()


class Asking(nn.Module):
    """Asks the module that it calls for its class and methods, next to control flow on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.sum() > -1e9 and isinstance(self.inner, nn.Linear):
            x = x * self.inner.scale() + self.inner.total
        return x


class Indexing(nn.Module):
    """Calls a sequence of modules, and items of it; one item leaves no trace in any graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)), nn.Sequential())

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if y.sum() > -1e9:
            y = y + self.inner[0](x) * len(self.inner)
        return y


class Counting(Indexing):
    """Looks at items without calling them."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if y.sum() > -1e9 and isinstance(self.inner[2], nn.Sequential):
            y = y * len(self.inner) + self.inner[0].weight.sum() + len(list(self.inner[2]))
        return y


@pytest.mark.parametrize("kind", [Asking, Indexing, Counting])
def test_python_code_sees_what_it_saw(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(2, 5, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        for training in (False, True):
            assert_same(model.train(training), each.train(training), x)
    assert gm.state_dict().keys() == model.state_dict().keys()
    quantized = prepare_saq(model, example_inputs=x)
    report = precision_report(quantized)
    assert report.uncounted == ()
    assert {layer.weight for _, layer in layers(quantized)} == {
        name for name in model.state_dict() if name.endswith("weight")
    }
    for each in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(each(x), quantized(x))


def test_an_item_that_is_called_alone_has_one_set_of_quantizers() -> None:
    gm = prepare_saq(Indexing(), example_inputs=torch.randn(1, 5, 8))
    assert {layer.name: layer.macs for _, layer in layers(gm)} == {"inner.0": 640, "inner.2.0": 320}


class Clashing(Scaled):
    def graph(self) -> float:
        return 2.0


def test_a_name_of_graphs_is_not_taken_for_the_module_s_own() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), Asking()), torch.randn(2, 5, 8)
    model[1].inner = Clashing(8, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same(model, gm, x)
    reason = "Clashing.graph has the name of an attribute of graphs: rename it"
    assert precision_report(gm).uncounted == (("1.inner", reason),)


class Appending(nn.Module):
    """Stays Python, and adds to a list of its caller."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:
        x = self.layer(x)
        if x.abs().sum() > 1e9:
            x = x / 2
        found.append(x.relu())
        return x


class Collecting(nn.Module):
    """Hands a list to modules, and goes on with what they have put there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Appending(), Appending(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        x = self.second(self.first(x, found), found)
        return [self.head(x + found[0]), *found]


def test_lists_that_python_parts_change() -> None:
    model, x = Collecting(), torch.randn(2, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same_function(model, gm, x)
    assert {layer.name for _, layer in layers(gm)} == {"first.layer", "second.layer", "head"}


class Shifting(nn.Module):
    """Uses a state where it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, state: list[Tensor] | None) -> Tensor:
        if state is not None:
            x = x + state[0]
        return self.layer(x)


class WithState(nn.Module):
    """Hands a state on in evaluation only, asks a layer for the bias that it has not, and for a value."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Shifting()
        self.plain = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9 or self.plain.bias is not None:
            x = x / 2
        return self.plain(self.inner(x, None if self.training else [x.square()]))


def test_parts_take_what_only_training_hands_to_them() -> None:
    model, x = WithState(), torch.randn(2, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same_function(model, gm, x)
    assert {layer.name for _, layer in layers(gm)} == {"inner.layer", "plain"}


class Mapped(nn.Module):
    """Calls a layer for each sample under vmap, and another one without."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = torch.vmap(self.each)(x)
        return self.all(h)


def test_what_runs_under_vmap_is_listed() -> None:
    model, x = Mapped(), torch.randn(2, 8)
    assert_same_function(model, prepare_saq(model, example_inputs=x, precision=None), x)
    report = precision_report(prepare_saq(model, example_inputs=x))
    assert [row.name for row in report.rows] == ["all"]
    assert ("each", "runs under torch.vmap, in which nothing is quantized") in report.uncounted


class Typed(nn.Module):
    """Asks for tensors of Python's types, which torch and numpy know by identity."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.ones(x.shape[0], 1, dtype=int) + torch.from_numpy(np.ones(3).astype(float)).sum()
        return self.layer(x) * steps.to(x.dtype)


def test_types_of_python_as_types_of_tensors() -> None:
    model, x = Typed(), torch.randn(2, 8)
    assert_same_function(model, prepare_saq(model, example_inputs=x, precision=None), x)


class Deciding(nn.Module):
    """Values decide whether a module is given a state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Shifting()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, [x.square()] if x.sum() > 0 else None)


@pytest.mark.parametrize("sign", [1, -1])
def test_parts_take_a_state_and_none(sign: int) -> None:
    model, x = Deciding(), torch.rand(2, 8)
    gm = prepare_saq(model, example_inputs=-x, precision=None)
    assert {layer.name for _, layer in layers(gm)} == {"inner.layer"}
    assert_same_function(model, gm, sign * x)


@pytest.mark.parametrize("normalize", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrized_parts(normalize: Callable[[nn.Module], nn.Module]) -> None:
    model, x = Deciding(), torch.rand(2, 8)
    normalize(model.inner.layer)
    assert_same_function(model, prepare_saq(model, example_inputs=x, precision=None), x)
    gm = prepare_saq(model, example_inputs=x).eval()
    assert [row.name for row in precision_report(gm).rows] == ["inner.layer"]
    for each in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(each(x), gm(x))
        assert isinstance(each.inner.layer, nn.Linear)
        assert torch.equal(each.inner.layer.weight, gm.inner.layer.weight)


class Expert(nn.Module):
    """Asks for the type of its input, and drops out between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.first(x))
        return self.second(hidden if hidden.dtype == self.second.weight.dtype else hidden.double())


class Choosing(nn.Module):
    """Gives each sample to the expert that the sign of its first value says."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(), Expert()])

    def forward(self, x: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(index)
            if chosen.any():
                result[chosen] = expert(x[chosen])
        return result


def test_experts_that_no_example_reaches_are_as_they_were() -> None:
    """Nothing that capturing adds to their modules stays there."""
    torch.manual_seed(0)
    model, x = Choosing(), torch.randn(8, 6)
    example = torch.cat([x[:, :1].abs(), x[:, 1:]], dim=1)
    gm = prepare_saq(model, example_inputs=example, precision=None)
    for mode in (True, False):
        torch.manual_seed(1)
        expected = model.train(mode)(x)
        torch.manual_seed(1)
        assert torch.equal(gm.train(mode)(x), expected)
    left = {name for name, each in gm.named_modules() if type(each).__name__ == "TrainingFlag"}
    assert not [name for name in left if name.count("training_flag") > 1]


class Codebook(nn.Module):
    """Holds a weight and modules, and has no forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.unused = nn.Parameter(torch.randn(4, 8)), nn.ModuleList([nn.Linear(8, 8)])


class Looking(nn.Module):
    """Python code that multiplies by a weight of a module without a forward, and holds lists that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.book, self.spare = nn.Linear(8, 8), Codebook(), nn.ModuleList([nn.Linear(8, 2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x = x + nn.functional.embedding(torch.tensor(1), self.book.weight)
        return nn.functional.linear(x, self.book.weight) if x.sum() > -1e9 else self.spare[0](x)


def test_modules_without_a_forward_are_not_listed() -> None:
    model, x = Looking(), torch.randn(2, 8)
    report = precision_report(prepare_saq(model, example_inputs=x))
    assert {row.name: row.macs for row in report.rows} == {
        "inner": 64, "book": 32, "book.unused.0": 0, "spare.0": 0,
    }  # fmt: skip
    assert report.uncounted == ()
    assert_same(model, prepare_saq(model, example_inputs=x, precision=None), x)


class TiedAcrossParts(nn.Module):
    """Two blocks, around control flow that no graph follows, share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        self.second = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        self.second[0].weight = self.first[2].weight
        self.asks = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(-y if self.asks and y.sum() < -1e9 else y)


def test_a_weight_that_parts_share_has_one_quantizer() -> None:
    torch.manual_seed(0)
    model, x = TiedAcrossParts(), torch.randn(8, 4)
    gm = prepare_saq(model, example_inputs=x)
    assert record_of(gm).tracing == "by parts"
    shared = gm.get_submodule("first.2.weight_quantizer")
    assert gm.get_submodule("second.0.weight_quantizer") is shared
    assert gm.get_submodule("second.2.weight_quantizer") is not shared
    copied = copy.deepcopy(gm)
    assert copied.get_submodule("second.0.weight_quantizer") is copied.get_submodule("first.2.weight_quantizer")
    assert torch.equal(copied(x), gm(x))


@pytest.mark.parametrize("case", [1, 2, 3])
def test_a_weight_that_parts_share_has_one_perturbation(case: int) -> None:
    torch.manual_seed(0)
    model, x = TiedAcrossParts(), torch.randn(8, 4)
    trained = []
    for asks in (True, False):
        model.asks = asks
        gm = prepare_saq(model, example_inputs=x)
        assert record_of(gm).tracing == ("by parts" if asks else "symbolic")
        opt = SAQ(gm, torch.optim.SGD(gm.parameters(), 0.1), rho=0.5, case=case, period=1)
        for _ in range(3):
            opt.step(lambda: gm(x).square().mean())  # noqa: B023
        trained.append(gm)
    by_parts, whole = (dict(gm.named_parameters()) for gm in trained)
    alike = by_parts.keys() & whole.keys()  # all but the second layer's own, which takes its name from the weight
    assert alike >= {"first.0.weight", "first.2.weight", "first.2.weight_quantizer.clipping_level", "second.2.weight"}
    for name in alike:
        assert torch.allclose(by_parts[name], whole[name], rtol=1e-5, atol=1e-7), name


class Handing(nn.Module):
    """Hands a head to its decoder, in one of several ways; the code of both may stay Python."""

    def __init__(self, hand: Callable[[Any, Tensor], Tensor], in_python: tuple[bool, bool]) -> None:
        super().__init__()
        self.stem, self.head, self.hand, self.in_python = nn.Linear(4, 4), nn.Linear(4, 4), hand, in_python[0]
        self.decoder = Taking(self.head, in_python[1])
        self.hidden: list[Any] = [self.head]
        self.hidden.append(self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.in_python and x.mean() < -100:
            x = 2 * x
        return self.hand(self, x)

    def twice(self, x: Tensor) -> Tensor:
        return 2 * self.head(x)


class Taking(nn.Module):
    """Calls what it is given, or what it knows by an attribute that is no child."""

    def __init__(self, other: nn.Module, in_python: bool) -> None:
        super().__init__()
        self.layer, self.others, self.in_python = nn.Linear(4, 4), (other,), in_python

    def forward(self, x: Tensor, head: Any = None) -> Tensor:
        x = self.layer(x)
        if self.in_python and x.mean() < -100:
            x = 2 * x
        return (head or self.others[0])(x)


HANDING = {
    "argument": lambda m, x: m.decoder(x, m.head),
    "keyword": lambda m, x: m.decoder(x, head=m.head),
    "hidden": lambda m, x: m.decoder(x, m.hidden[0]),
    "method": lambda m, x: m.decoder(x, m.twice),
    "function": lambda m, x: m.decoder(x, lambda y: m.head(y) + x.sum()),
    "known": lambda m, x: m.decoder(x),
    "also_called": lambda m, x: m.decoder(x, m.head) + m.head(x),
}


@pytest.mark.parametrize("in_python", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", HANDING)
def test_modules_handed_to_others_are_quantized(name: str, in_python: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    model, x = Handing(HANDING[name], in_python), torch.randn(3, 4)
    graph = prepare_saq(model, example_inputs=x, precision=None)
    for each in (x, x[:1]):
        assert torch.equal(graph(each), model(each))
    gm = prepare_saq(model, example_inputs=x)
    found = precision_report(gm)
    assert {row.name.partition("@")[0] for row in found.rows} == {"stem", "head", "decoder.layer"}
    assert found.total_macs == (4 if name == "also_called" else 3) * 16
    assert found.uncounted == ()
    other = copy.deepcopy(gm)
    assert torch.equal(other(x), gm(x))


class Lending(nn.Module):
    """A network makes the parameters of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.maker, self.small = nn.Linear(4, 4), nn.Linear(4, 10), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        made = self.maker(x.mean(0))
        return torch.func.functional_call(self.small, {"weight": made[:8].view(2, 4), "bias": made[8:]}, (x,))


def test_modules_that_are_lent_parameters() -> None:
    torch.manual_seed(0)
    model, x = Lending(), torch.randn(3, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    for each in (x, x[:2]):
        assert torch.equal(gm(each), model(each))
    gm(x).sum().backward()
    model(x).sum().backward()
    assert torch.equal(gm.maker.weight.grad, model.maker.weight.grad)
    assert gm.small.weight.grad is None
    found = precision_report(prepare_saq(model, example_inputs=x))
    assert [row.name for row in found.rows] == ["stem", "maker", "small"]
    assert found.uncounted == ()


class Chosen(nn.Module):
    """Which forward it has was chosen when it was made; the code of one stays Python and multiplies itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.forward = getattr(self, name)

    def traced(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(self.first(x)) * scale

    def untraced(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.first(x)
        return x @ self.last.weight.t() * scale if x.mean() > -100 else x


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["traced", "untraced"])
def test_a_forward_of_the_object(name: str, inside: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Chosen(name), nn.ReLU()) if inside else Chosen(name), torch.randn(3, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(each(x), model(x))
    assert inside or torch.equal(gm(x, scale=1.0), model(x))
    found = precision_report(prepare_saq(model, example_inputs=x))
    assert found.total_macs == 4 * 4 + 4 * 2
    assert found.quantized_share == 1


class Watched(nn.Module):
    """Attention whose weights are asked for in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x, weights = self.attention(x, x, x, need_weights=self.training)
        return self.head(x), weights


def test_attention_that_gives_weights_in_training_only_is_listed() -> None:
    model, x = Watched(), torch.randn(2, 3, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    for training in (True, False):
        (output, weights), (expected, others) = gm.train(training)(x), model.train(training)(x)
        assert torch.equal(output, expected)
        assert (weights is None) == (not training) == (others is None)
    assert [name for name, _ in precision_report(prepare_saq(model, example_inputs=x)).uncounted] == ["attention"]


class LowPrecision(nn.Module):
    """Runs its layers under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).float()


def test_parts_of_code_under_autocast_are_captured_under_it() -> None:
    model, x = LowPrecision(), torch.randn(2, 4)
    assert_same_function(model, prepare_saq(model, example_inputs=x, precision=None), x)
    found = precision_report(prepare_saq(model, example_inputs=x))
    assert [row.name for row in found.rows] == ["first", "second.0", "second.2"]
    assert found.uncounted == ()


class Retying(nn.Module):
    """Ties its weights whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.second.weight = self.first.weight
        return self.second(self.first(x))


def test_parameters_that_forward_puts_in_the_place_of_others() -> None:
    model, x = Retying(), torch.randn(2, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert all(torch.equal(*pair) for pair in zip(gm.state_dict().values(), model.state_dict().values(), strict=True))
    for each in (gm, copy.deepcopy(gm)):
        assert_same_function(copy.deepcopy(model), each, x)


class Drawing(nn.Module):
    """Python code, since it draws from Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (random.random() < 2)


def test_parts_of_a_model_without_values_are_counted() -> None:
    gm = prepare_saq(Drawing().to("meta"), example_inputs=torch.zeros(1, 8, device="meta"), precision=None)
    assert record_of(gm).tracing == "by parts"
    assert [layer.macs for _, layer in layers(gm)] == [32]
