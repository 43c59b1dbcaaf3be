"""Sizes of inputs: the graph takes those that the model takes, whatever its code makes of them."""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from saq_fx.annotation import record_of
from saq_fx.errors import TracingError
from saq_fx.prepare import prepare_saq
from saq_fx.report import precision_report
from tests.test_prepare import assert_same_function as assert_same

V = torch.linspace(-1, 1, 80).reshape(2, 5, 8)
OTHERS = (torch.linspace(-2, 1, 144).reshape(3, 6, 8), torch.linspace(-1, 3, 32).reshape(1, 4, 8))

Body = Callable[[Any, Tensor], Any]


class Around(nn.Module):
    """Code between two layers."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, self.a(x))


def whole_windows(model: Any, h: Tensor) -> Tensor:
    """As Swin's code counts its windows."""
    _, length, width = h.shape
    windows = h.reshape(-1, length // 1, width)
    count = int(windows.shape[0] / (length * width / length / width))
    assert isinstance(count, int)
    return model.b(windows.view(count, float(length).__trunc__(), -1))


def python_numbers(model: Any, h: Tensor) -> Tensor:
    rows, rest = divmod(len(h) * int(h.shape[1]), math.ceil(h.shape[1]))
    return model.b(h) * rows + rest + float(h.size(2)) / round(h.shape[0] * 2.0)


def numpy_numbers(model: Any, h: Tensor) -> Tensor:
    scaled = np.sqrt(8.0) * model.b(h) / np.sqrt(h.shape[-1]) + np.float32(0.5)
    return scaled.reshape(h.shape[0], int(np.prod(h.shape[1:]))) * np.pi


def by_sample(model: Any, h: Tensor) -> Tensor:
    return torch.stack([model.b(h[i]) * (i + 1) for i in range(len(h))])


def padded(model: Any, h: Tensor) -> Tensor:
    if h.shape[1] % 2:
        h = F.pad(h, (0, 0, 0, 1))
    return model.b(h)


def single(model: Any, h: Tensor) -> Tensor:
    return model.b(h if h.shape[0] != 1 else h.flip(1))


def stepwise(model: Any, h: Tensor) -> Tensor:
    state = h.new_zeros(h.size(0), 8)
    for step in range(h.size(1)):
        state = model.b(h[:, step] + state).tanh()
    return state


@pytest.mark.parametrize(
    ("body", "way"),
    [
        (whole_windows, "symbolic"),
        (python_numbers, "symbolic"),
        (numpy_numbers, "symbolic"),
        (by_sample, "by parts"),
        (padded, "by parts"),
        (single, "by parts"),
        (stepwise, "by parts"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_other_sizes(body: Body, way: str) -> None:
    model = Around(body)
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert record_of(gm).tracing == way
    for inputs in (V, *OTHERS):
        assert_same(model, gm, inputs)
    quantized = prepare_saq(model, example_inputs=V)
    assert [row.name for row in precision_report(quantized).rows] == ["a", "b"]
    assert all(quantized(inputs).isfinite().all() for inputs in OTHERS)


class Stepping(nn.Module):
    """Goes through time, from a state if it is given one; channels are last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        state = torch.zeros_like(x[:, 0]) if state is None else state
        for step in range(x.size(1)):
            state = self.b(self.a(x[:, step]) + state).tanh()
        return state


class ChannelsLast(nn.Module):
    """Pads images to whole windows, with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        return self.b(x)


@pytest.mark.parametrize(
    ("kind", "shapes", "others"),
    [
        (Stepping, [(2, 8, 8), (2, 8)], [(3, 5, 8), (3, 8)]),
        (Stepping, [(2, 3, 3, 3, 8)], [(1, 4, 3, 3, 8)]),
        (ChannelsLast, [(2, 4, 4, 8)], [(1, 5, 6, 8)]),
    ],
)
def test_every_axis_may_have_another_size(kind: type[nn.Module], shapes: list[Any], others: list[Any]) -> None:
    model = kind()
    gm = prepare_saq(model, example_inputs=tuple(map(torch.randn, shapes)), precision=None)
    for each in (shapes, others):
        assert_same(model, gm, tuple(map(torch.randn, each)))


class Gathering(nn.Module):
    """Takes as many sets as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sets: list[Tensor]) -> Tensor:
        return torch.stack([self.b(self.a(each).relu().sum(0)) for each in sets])


def test_lists_may_have_another_length() -> None:
    model, sets = Gathering(), [torch.randn(size, 8) for size in (3, 5, 2, 4)]
    gm = prepare_saq(model, example_inputs=(sets[:2],), precision=None)
    for each in (sets[:2], sets, sets[:1]):
        assert_same(model, gm, (each,))


class Multiplying(nn.Module):
    """Asks for the length, next to a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.a(x) @ self.b(x).transpose(1, 2)
        return scores if x.shape[1] > 4 else scores.relu()


def test_products_next_to_a_question_for_the_length() -> None:
    model = Multiplying()
    gm = prepare_saq(model, example_inputs=V, precision=None)
    for inputs in (V, V[:, :4], *OTHERS):
        assert_same(model, gm, inputs)
    report = precision_report(prepare_saq(model, example_inputs=V))
    assert {row.name: row.macs for row in report.rows} == {"a": 5 * 64, "b": 5 * 64, "matmul": 5 * 5 * 8}
    assert report.quantized_share == 1


class Optional(nn.Module):
    """An argument that is given, and may be None."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None, scale: float = 2.0) -> Tensor:
        h = self.a(x)
        return self.b(h * scale if mask is None else h * mask)


@pytest.mark.parametrize("inputs", [(V, None), (V, None, 3.0), {"x": V, "mask": None}], ids=["two", "three", "names"])
def test_an_argument_given_as_none(inputs: Any) -> None:
    model = Optional()
    gm = prepare_saq(model, example_inputs=inputs, precision=None)
    assert_same(model, gm, inputs)
    with pytest.raises(TracingError, match="'mask'"):
        gm(V, V)


def test_ordered_dictionaries_come_back_as_such() -> None:
    gm = prepare_saq(Around(lambda m, h: OrderedDict(x=m.b(h), y=[h])), example_inputs=V, precision=None)
    output = gm(V)
    assert type(output) is OrderedDict
    assert list(output) == ["x", "y"]


class Avoiding(nn.Module):
    """Takes another way to the same values where values are symbolic, as transformers' masks do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        if isinstance(x, fx.Proxy) or (not isinstance(positions, fx.Proxy) and bool((positions < 0).any())):
            x = x + 1
        if isinstance(mask, fx.Proxy) or not mask.all():
            x = x * mask[..., None]
        return self.b(self.a(x))


def test_code_that_asks_whether_values_are_symbolic() -> None:
    model, masks = Avoiding(), (torch.ones(2, 5).long(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]))
    gm = prepare_saq(model, example_inputs=(V, masks[1]), precision=None)
    for mask in masks:
        assert_same(model, gm, (V, mask))


def test_grouped_queries_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=32, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    tokens = torch.arange(3, 17).reshape(2, 7)
    gm = prepare_saq(model, example_inputs={"input_ids": tokens}, precision=None)
    for ids in (tokens, tokens[:, :5].repeat(2, 1)):
        gradients = []
        for each in (model, gm):
            each.zero_grad()
            output = each(input_ids=ids).last_hidden_state
            output.square().sum().backward()
            gradients.append([output, *(parameter.grad for parameter in each.parameters())])
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
