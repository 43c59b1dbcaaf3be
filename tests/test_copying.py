"""Copies of modules against `copy.deepcopy`."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from saq_fx.copying import copied, copy_module
from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from tests.zoo import ZOO


class Sharing(nn.Module):
    """A weight that is tied, an attribute that two modules know, and modules in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.known: dict[str, Tensor] = {}
        self.first.known = self.second.known = self.known
        self.listed = [self.second, {"first": self.first}]
        self.register_buffer("absent", None)
        self.register_buffer("scale", torch.ones(2), persistent=False)
        self.itself = self.first._forward_hooks
        self.handle = self.second.register_forward_hook(double)
        self.removed = self.first.register_forward_hook(double)
        self.removed.remove()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(self.first(x))
        return output


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


class Stated(nn.Linear):
    """Says itself what is copied of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "copied": True}


def test_what_modules_share_their_copies_share() -> None:
    model = Sharing()
    own = copy_module(model)
    assert list(vars(own)) == list(vars(model))
    assert own.second.weight is own.first.weight is not model.first.weight
    assert own.first.known is own.second.known is own.known is not model.known
    assert own.listed[0] is own.second
    assert own.listed[1]["first"] is own.first
    assert own.itself is own.first._forward_hooks
    assert set(own.state_dict()) == set(model.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(own(x), model(x))
    own.handle.remove()
    assert torch.equal(2 * own(x), model(x))


def test_classes_that_say_how_they_are_copied_are_obeyed() -> None:
    stated = Stated(2, 2)
    own = copy_module(nn.Sequential(stated))
    assert own[0].copied
    assert torch.equal(own[0].weight, stated.weight)


class Enclosing(nn.Module):
    """Functions that know the model's modules: in an attribute, in containers, as a hook, as a forward, by defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.features = nn.Linear(3, 3), nn.Linear(3, 3), dict[str, Tensor]()
        layers, usual = nn.ModuleDict({"inner": self.inner}), self.outer.forward
        self.feed: Callable[[Tensor], Tensor] = lambda x: layers["inner"](x).relu()
        self.table = {"first": lambda x, layer=self.inner: layer(x)}
        self.listed = [lambda x: F.linear(x, self.inner.weight), len]
        self.outer.forward = lambda x: usual(x) * 2  # type: ignore[method-assign, assignment]
        self.outer.register_forward_hook(lambda module, args, output: self.keep(output))

    def keep(self, output: Tensor) -> None:
        self.features["outer"] = output

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(self.feed(x) + self.table["first"](x) + self.listed[0](x))
        return self.features["outer"] + x


def test_functions_know_the_modules_of_the_copy() -> None:
    model, x = Enclosing(), torch.randn(2, 3)
    own, gm = copy_module(model), prepare_saq(model, example_inputs=x, precision=None)
    assert own.listed[1] is len
    assert {layer.name for _, layer in layers(gm)} == {"inner", "inner@1", "inner@2", "outer"}
    before = model(x).detach()
    with torch.no_grad():
        model.inner.weight.zero_()
        model.outer.weight.zero_()
    model.features.clear()
    assert torch.equal(own(x), before)
    assert torch.equal(gm(x), before)
    assert not model.features


@pytest.mark.parametrize(
    "module",
    [nn.LSTM(3, 4), parametrizations.weight_norm(nn.Linear(3, 3)), nn.BatchNorm2d(3), nn.MultiheadAttention(4, 2)],
    ids=lambda module: type(module).__name__,
)
def test_torchs_modules_are_copied_as_by_deepcopy(module: nn.Module) -> None:
    expected, own = copy.deepcopy(module), copy_module(module)
    assert type(own) is type(expected)
    assert vars(own).keys() == vars(expected).keys()
    for (name, tensor), (other, its) in zip(own.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(tensor, its)
    mine = {tensor.data_ptr() for tensor in own.state_dict().values()}
    assert mine.isdisjoint(tensor.data_ptr() for tensor in module.state_dict().values())


@pytest.mark.parametrize("name", ZOO)
def test_copies_of_all_models_have_their_attributes(name: str) -> None:
    model = ZOO[name].make()
    expected, own = copy.deepcopy(model), copied(model)
    for (path, module), (other, its) in zip(own.named_modules(), expected.named_modules(), strict=True):
        assert path == other
        assert vars(module).keys() == vars(its).keys()
        plain = {key: each for key, each in vars(its).items() if isinstance(each, bool | int | float | str)}
        assert {key: vars(module)[key] for key in plain} == plain
    assert all(torch.equal(*pair) for pair in zip(own.parameters(), expected.parameters(), strict=True))


class PassingOff(nn.Module):
    """A wrapper that has the attributes of what it wraps, and stays Python."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wrapped(x)
        return x if x.sum() > -1e9 else self.in_features * x


def test_wrappers_that_pass_off_attributes_are_copied() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), PassingOff(nn.Linear(4, 4))), torch.randn(2, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    for each in (copy.deepcopy(gm), copy.deepcopy(copy.deepcopy(gm)), pickle.loads(pickle.dumps(gm))):
        assert each.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(each(x), model(x))
        each.get_parameter("1.wrapped.weight").data.zero_()
    assert torch.equal(gm(x), model(x))


class Copied(nn.Parameter):
    """Says itself how it is copied."""

    def __deepcopy__(self, memo: Any) -> "Copied":
        return Copied(self.data.clone(), self.requires_grad)


class Hooked(nn.Module):
    """Two names of one parameter, views of a complex buffer, and hooks of gradients, of which one knows the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.weight = self.again = Copied(torch.randn(3, 3))
        complex_numbers = torch.randn(3, dtype=torch.cfloat)
        self.register_buffer("conjugate", complex_numbers.conj())
        self.register_buffer("numbers", complex_numbers)
        self.register_buffer("mask", torch.ones(3, 3))
        self.layer.weight.register_hook(lambda gradient: gradient * self.mask)
        self.layer.bias.register_hook(double_gradient)
        self.layer.bias.requires_grad_(False)
        self.weight.register_post_accumulate_grad_hook(halve)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.layer(x), self.weight), self.again) + self.numbers.imag


def double_gradient(gradient: Tensor) -> Tensor:
    return 2 * gradient


def halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def test_parameters_of_other_classes_and_hooks_of_gradients() -> None:
    model, x = Hooked(), torch.randn(2, 3)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert gm.weight is gm.again is not model.weight
    assert torch.equal(gm.numbers, model.numbers)
    assert torch.equal(gm.conjugate, model.conjugate)
    assert not gm.layer.bias.requires_grad
    for each in (model, gm):
        each.layer.bias.requires_grad_(True)
        assert each(x).square().sum().backward() is None
    for name, parameter in model.named_parameters():
        assert torch.equal(gm.get_parameter(name).grad, parameter.grad)
    gm.zero_grad()
    gm.mask.zero_()
    gm(x).sum().backward()
    assert not gm.layer.weight.grad.any()
