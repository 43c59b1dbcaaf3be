"""What a model does in one mode only, its graph does in that mode only: values, gradients, buffers, random numbers."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.annotation import record_of
from saq_fx.errors import TracingError
from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from saq_fx.report import precision_report
from tests.test_hostile import assert_same


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("running", torch.ones(8))
        self.register_buffer("count", torch.zeros(()))


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x.mul_(0.5)
            x[:, 0] = 0
        else:
            F.relu(x, inplace=True)
        return self.second(x)


class InPlaceChained(Base):
    """The result of what writes in place is used, in each mode."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x.mul_(0.5).add_(1) if self.training else x.clamp_(-0.1, 0.1)
        return self.second(x)


class Statistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.running.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
            self.count.add_(1)
        return self.second(x / self.running)


class Unlike(Base):
    """One operation in both modes, of tensors of other shapes; one mode goes on with it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + x if self.training else h * (self.running + 2.0).view(1, 1, 8)
        return self.second(h)


class Shortened(Base):
    """A layer takes less in training, which what evaluation does with its output cannot take."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x[:, :2] if self.training else x)
        return self.second(h if self.training else h.reshape(x.shape).flip(1))


class Normalization(nn.Module):
    """A BatchNorm written by hand: other statistics in each mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, variance = x.mean((0, 1)), x.var((0, 1))
            self.mean.lerp_(mean.detach(), 0.1)
            self.variance.lerp_(variance.detach(), 0.1)
        else:
            mean, variance = self.mean, self.variance
        return (x - mean) * (variance + 1e-5).rsqrt() * self.weight


class Normalized(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), Normalization(8), nn.ReLU(), nn.Linear(8, 8), Normalization(8))


class Codebook(Base):
    """Moves its codes by averages, in training only, as a VQ-VAE does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            mask = F.one_hot(x.detach().argmax(-1), 8).to(x.dtype)
            self.running.data.mul_(0.9).add_(mask.mean((0, 1)), alpha=0.1)
        return self.second(x * self.running)


class Noise(Base):
    """Random numbers in other places in each mode, and in both."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        x = self.first(x)
        if not self.training:
            x = x + torch.rand(8).bernoulli_(0.5)
        return self.second(F.dropout(x, 0.5, True))


class Dropping(Base):
    """Hands the mode on to dropout, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            x = F.dropout(x, 0.5, self.training) + F.dropout(x, p=0.2, training=self.training)
        return self.second(x)


class OtherArguments(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + (torch.sum(x, 1, True) if self.training else torch.sum(x, (0, 1)))
        return self.second(F.softmax(x, dim=-1) if self.training else F.softmax(x, -1, dtype=torch.float32))


class Arithmetic(Base):
    """The mode as a number, and compared."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) * (1 + 0.5 * self.training)
        return self.second(x + 1 if self.training == True else x - 1)  # noqa: E712


class Guarded(Base):
    """Asks for sizes, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] < 2:
            raise ValueError("too few samples")
        return self.second(self.first(x))


SYMBOLIC = (
    InPlace, InPlaceChained, Statistics, Normalized, Codebook, Noise, Dropping, OtherArguments, Arithmetic, Guarded,
    Unlike,
)  # fmt: skip


class Swapped(Base):
    """The same layers in another order."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if self.training else self.first(self.second(x))


class OnlyInEvaluation(Base):
    """A layer with a state of its own that training must not run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x if self.training else self.norm(x))


class Checked(Base):
    """Values steer it, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.1, self.training)
        if self.training and x.abs().max() > 0.5:
            x = x.clamp(-0.5, 0.5)
        return self.second(x)


class Skipping(Base):
    """Leaves out layers at random."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            if self.training and torch.rand(()) < 0.5:
                continue
            x = x + layer(x)
        return x


class SkippingItem(Base):
    def forward(self, x: Tensor) -> Tensor:
        chance = torch.empty(1)
        chance.uniform_()
        return self.second(x) if self.training and chance.item() < 0.5 else self.second(self.first(x))


BY_PARTS = (Swapped, OnlyInEvaluation, Checked, Skipping, SkippingItem, Shortened)


class Around(nn.Module):
    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner = kind()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.inner(x), 0.2, self.training))


def assert_same_in_each_mode(model: nn.Module, gm: nn.Module, x: Tensor) -> None:
    for training in (False, True, False, True):
        assert_same(model.train(training), gm.train(training), x)
        drawn = []
        for each in (model, gm):
            torch.manual_seed(3)
            each(x)
            drawn.append(torch.get_rng_state())
        assert torch.equal(*drawn)


@pytest.mark.parametrize("traced_in_training", [False, True])
@pytest.mark.parametrize("kind", [*SYMBOLIC, *BY_PARTS])
@pytest.mark.parametrize("wrap", [lambda kind: kind(), lambda kind: nn.Sequential(kind()), Around])
def test_each_mode_is_the_model_s(wrap: Callable[..., nn.Module], kind: type, traced_in_training: bool) -> None:
    model, x = wrap(kind).train(traced_in_training), torch.randn(2, 5, 8)
    before = copy.deepcopy(model.state_dict())
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert record_of(gm).tracing == ("symbolic" if kind in SYMBOLIC else "by parts")
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        model.load_state_dict(before)
        assert all(torch.equal(each.state_dict()[name], value) for name, value in before.items())
        assert_same_in_each_mode(model, each, x)
        assert_same_in_each_mode(model, each, torch.randn(3, 5, 8))


@pytest.mark.parametrize("kind", [*SYMBOLIC, *BY_PARTS])
def test_layers_are_quantized_in_both_modes(kind: type) -> None:
    gm = prepare_saq(Around(kind), example_inputs=torch.randn(2, 5, 8))
    assert precision_report(gm).uncounted == ()
    weights = {layer.weight for _, layer in layers(gm)}
    assert weights == {name for name, each in Around(kind).named_parameters() if each.dim() == 2}
    for training in (False, True):
        for quantizer in [each for each in gm.modules() if hasattr(each, "clipping_level")]:
            quantizer.clipping_level.grad = None
        torch.manual_seed(2)  # of random layers, one that draws them all
        gm.train(training)(torch.randn(2, 5, 8)).square().sum().backward()
        used = {layer.weight for _, layer in layers(gm) if gm.get_parameter(str(layer.weight)).grad is not None}
        if kind not in (Skipping, SkippingItem):
            assert used == weights
            read = {layer.weight_quantizer for _, layer in layers(gm)}
            assert all(gm.get_submodule(str(path)).clipping_level.grad is not None for path in read)


@pytest.mark.parametrize("kind", [InPlace, Statistics, Normalized, Noise])
def test_a_frozen_part_keeps_its_own_mode(kind: type) -> None:
    model, x = nn.Sequential(kind(), nn.Linear(8, 8), kind()), torch.randn(2, 5, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    for each in (model, gm):
        each.train()
        each.get_submodule("0").eval()
    assert_same(model, gm, x)


class Depending(nn.Module):
    """Its code asks for the mode of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 8), InPlace()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.other(x if self.other.training or self.training else x * 2)


def test_modes_that_depend_on_each_other_are_one_or_an_error() -> None:
    model, x = Depending(), torch.randn(2, 5, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same_in_each_mode(model, gm, x)
    gm.train().get_submodule("other").eval()
    with pytest.raises(TracingError, match=r"each other's mode.*the model: True, other: False.*Set them to one mode"):
        gm(x)


class Listening(nn.Sequential):
    """Its code goes through all that it holds."""

    def forward(self, x: Tensor) -> Tensor:
        for child in self:
            x = F.dropout(child(x), 0.3, self.training)
            if self.training:
                x = x * 2
        return x


def test_flags_are_not_among_the_modules_that_code_goes_through() -> None:
    model, x = Listening(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 5, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same_in_each_mode(model, gm, x)
    assert not any("training_flag" in name for name, _ in model.named_modules())


class Sharing(nn.Module):
    """A weight is read by code that cannot be followed, and then by code that can."""

    def __init__(self) -> None:
        super().__init__()
        self.dropping, self.plain = Skipping(), Base()
        self.plain.first.weight = self.dropping.second.weight = self.dropping.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropping(F.linear(x, self.plain.second.weight))
        return F.linear(F.linear(x, self.plain.first.weight), self.plain.second.weight)


def test_what_was_recorded_in_vain_is_not_read_again() -> None:
    model, x = Sharing(), torch.randn(2, 5, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same_in_each_mode(model, gm, x)
    assert all("dropping" in path for path in record_of(gm).parts)


class Reset(Base):
    """Other parameters in the place of its own, in training, as of the codebooks of VQ-VAEs."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training:
            self.second.weight = nn.Parameter(0.9 * self.second.weight + 0.1 * x.detach().mean((0, 1)))
        return F.linear(x, self.second.weight)


@pytest.mark.parametrize("wrap", [lambda kind: kind(), Around])
def test_preparing_replaces_no_parameters_as_training_does(wrap: Callable[..., nn.Module]) -> None:
    model, x = wrap(Reset), torch.randn(2, 5, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert all(torch.equal(gm.state_dict()[name], value) for name, value in model.state_dict().items())
    assert_same_in_each_mode(model, gm, x)
    assert_same_in_each_mode(model, gm, torch.randn(3, 5, 8))
