"""No unsigned quantizer on values that can be negative, however they came to be; unsigned ones where none can."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from saq_fx.quantizers import Quantizer

Body = Callable[[Tensor, Tensor], Any]


def _then(h: Tensor, *changes: Any) -> Tensor:
    """The tensor, after something was done to it."""
    return h


class Around(nn.Module):
    """A function of two activations between linear layers; the result enters `c` first, which is not the last layer."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.body(self.a(x).abs(), self.b(x).abs())))


def written(body: Body) -> Around:
    """What enters `c` is what the body wrote to, not what it returned."""
    return Around(lambda h, y: _then(h, body(h, y)))


SIGNED: dict[str, Body] = {
    "mul": lambda h, y: torch.mul(h, -1),
    "mul_method": lambda h, y: h.mul(-1),
    "mul_operator": lambda h, y: h * -1,
    "add": lambda h, y: torch.add(h, -1),
    "add_alpha": lambda h, y: torch.add(h, y, alpha=-1),
    "add_method_alpha": lambda h, y: h.add(y, alpha=-2),
    "add_keyword": lambda h, y: h.add(other=-1),
    "div": lambda h, y: h.div(-2),
    "div_keyword": lambda h, y: torch.div(h, other=-2.0),
    "sub": lambda h, y: h - y,
    "pad": lambda h, y: F.pad(h, (1, 0), value=-1.0)[..., :8],
    "where": lambda h, y: torch.where(h > 0.5, h, -1.0),
    "packet": lambda h, y: torch.ops.aten.add.Tensor(h, y, alpha=-1),
    "fill": lambda h, y: h.masked_fill(h > 0.5, -1.0),
}
SPOILED: dict[str, Body] = {
    "sub_": lambda h, y: h.sub_(1),
    "add_": lambda h, y: h.add_(-1),
    "add_alpha_": lambda h, y: h.add_(y, alpha=-1),
    "mul_": lambda h, y: h.mul_(-1),
    "neg_of_view": lambda h, y: h[:, :1].neg_(),
    "neg_of_transposed": lambda h, y: h.transpose(0, 1).diagonal().neg_(),
    "clamp_": lambda h, y: h.clamp_(-2, -1),
    "copy_": lambda h, y: h.copy_(y - 3),
    "setitem": lambda h, y: operator.setitem(h, (..., 0), -3),
    "setitem_tensor": lambda h, y: operator.setitem(h, (..., 0), y[..., 0] - 3),
    "out": lambda h, y: torch.sub(y, 3, out=h),
    "functional": lambda h, y: F.leaky_relu(h.sub_(1), 0.1, True),
    "aten": lambda h, y: torch.ops.aten.sub_.Tensor(h, y),
    "view_of_view": lambda h, y: h.view(-1, 8).t()[0].sub_(2),
}
UNSIGNED: dict[str, Body] = {
    "add": lambda h, y: torch.add(h, y, alpha=2),
    "method": lambda h, y: h.add(y).div(2),
    "mean": lambda h, y: (h + y).mean(-1, keepdim=True).expand(-1, -1, 8),
    "where": lambda h, y: torch.where(h > 0.5, h, 0.0),
    "clamp": lambda h, y: (h - y).clamp(min=0),
    "clamped": lambda h, y: torch.clamp(h - y, 0, 1),
    "cat": lambda h, y: torch.cat([h[..., :4], torch.zeros_like(y[..., :4])], -1),
    "setitem": lambda h, y: _then(h, operator.setitem(h, (..., 0), 3), operator.setitem(h, (..., 1), y[..., 0])),
    "relu_": lambda h, y: _then(h, h.relu_(), h.add_(y), h[..., :2].mul_(2), torch.mul(h, y, out=h)),
    "copy": lambda h, y: _then(h, (h - 3).sub_(1)),
}


def _reading(models: dict[str, Body], make: Callable[[Body], nn.Module]) -> list[Any]:
    return [pytest.param(make, body, id=name) for name, body in models.items()]


@pytest.mark.parametrize(
    ("make", "body"), _reading(SIGNED, Around) + _reading(SPOILED, written) + _reading(UNSIGNED, Around)
)
def test_no_unsigned_quantizer_sees_negative_values(make: Callable[[Body], nn.Module], body: Body) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8)
    model = make(body).eval()
    gm = prepare_saq(model, example_inputs=x).eval()
    with torch.no_grad():
        expected = model(x.clone())
    unsigned = [each for each in gm.modules() if isinstance(each, Quantizer) and not getattr(each, "signed", True)]
    least: list[float] = []
    for quantizer in unsigned:
        quantizer.register_forward_pre_hook(lambda _, args: least.append(float(args[0].min())))
    with torch.no_grad():
        actual = gm(x.clone())
    assert min(least, default=0.0) >= 0
    assert (actual - expected).norm() < 0.5 * expected.norm()


def _signed_of_c(gm: fx.GraphModule) -> bool:
    return next(layer.activation_signed for _, layer in layers(gm) if layer.name.endswith("c"))


@pytest.mark.parametrize("body", UNSIGNED.values(), ids=UNSIGNED)
def test_what_stays_nonnegative_is_unsigned(body: Body) -> None:
    assert not _signed_of_c(prepare_saq(Around(body), example_inputs=torch.randn(2, 8, 8)))


@pytest.mark.parametrize(("make", "body"), _reading(SIGNED, Around) + _reading(SPOILED, written))
def test_what_may_be_negative_is_signed(make: Callable[[Body], nn.Module], body: Body) -> None:
    assert _signed_of_c(prepare_saq(make(body), example_inputs=torch.randn(2, 8, 8)))


class InPlaceModule(nn.Module):
    """An in-place activation behind a ReLU whose value is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.d = (nn.Linear(8, 8) for _ in range(3))
        self.change = nn.ELU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        self.change((h.view(-1, 8)).sub_(1))
        return self.d(self.c(h))


def test_a_module_may_write_in_place() -> None:
    assert _signed_of_c(prepare_saq(InPlaceModule(), example_inputs=torch.randn(2, 8, 8)))


@pytest.mark.parametrize(("function", "other"), [(operator.isub, 1), (operator.iadd, -1), (operator.imul, -1)])
def test_augmented_assignments_write_in_place(function: Callable[..., Any], other: float) -> None:
    graph = fx.Graph()
    h = graph.call_function(torch.relu, (graph.call_module("a", (graph.placeholder("x"),)),))
    graph.call_function(function, (graph.call_method("view", (h, -1)), other))
    graph.output(graph.call_module("d", (graph.call_module("c", (h,)),)))
    gm = prepare_saq(fx.GraphModule(InPlaceModule(), graph), example_inputs=torch.randn(2, 8, 8))
    assert _signed_of_c(gm)
