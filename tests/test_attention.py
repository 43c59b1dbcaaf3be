"""Opened attention against torch's own, bit for bit: outputs and gradients, in both modes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq

Attend = Callable[[nn.MultiheadAttention, Tensor, bool], Any]


class Attending(nn.Module):
    def __init__(self, attend: Attend, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=batch_first)
        self.attend, self.weights = attend, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.attend(self.attention, self.a(x), self.weights)[0])


def results(module: nn.Module, *inputs: Any) -> list[Tensor]:
    """Output and gradients, from a fixed random state."""
    module.zero_grad()
    torch.manual_seed(1)
    output = module(*inputs)
    output.square().sum().backward()
    return [output, *(each.grad for _, each in sorted(module.named_parameters()) if each.grad is not None)]


def assert_equal(model: nn.Module, gm: nn.Module, *inputs: Any) -> None:
    for training in (False, True):
        expected, actual = results(model.train(training), *inputs), results(gm.train(training), *inputs)
        assert len(actual) == len(expected)
        assert all(map(torch.equal, actual, expected))


ATTENDED: dict[str, tuple[Attend, int]] = {
    "one": (lambda m, h, weights: m(h, h, h, need_weights=weights), 1),
    "query": (lambda m, h, weights: m(h * 2, h, h, need_weights=weights), 2),
    "all": (lambda m, h, weights: m(h + 1, h + 2, h, need_weights=weights), 3),
    "value": (lambda m, h, weights: (lambda q: m(q, q, h, need_weights=weights))(h * 2), 3),
}


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ATTENDED)
def test_projections_are_torchs(kind: str, batch_first: bool, weights: bool) -> None:
    attend, projections = ATTENDED[kind]
    model, x = Attending(attend, batch_first, weights), torch.randn(2, 5, 8)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_equal(model, gm, x)
    names = [layer.name for _, layer in layers(prepare_saq(model, example_inputs=x))]
    assert sum("in_proj" in name for name in names) == projections


class Hinted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor, is_causal: bool, padding: Tensor | None = None) -> Tensor:
        h = self.a(x)
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        found, _ = self.attention(h, h, h, padding, False, mask, is_causal=is_causal)
        return found


def test_the_hint_that_a_mask_is_causal_may_be_an_input() -> None:
    model, x = Hinted(), torch.randn(5, 2, 8)
    gm = prepare_saq(model, example_inputs=(x, True), precision=None)
    for is_causal in (True, False):
        assert_equal(model, gm, x, is_causal)
    quantized = prepare_saq(model, example_inputs=(x, True), precision="W8A8").eval()
    assert torch.equal(quantized(x, True), quantized(x, False))
    padding = torch.zeros(2, 5).masked_fill(torch.arange(5) > 3, float("-inf"))
    gm = prepare_saq(model, example_inputs=(x, True, padding), precision=None)
    assert_equal(model, gm, x, True, padding)


def test_a_decoder() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2)
    inputs = (torch.randn(2, 5, 8), torch.randn(2, 6, 8))
    assert_equal(model, prepare_saq(model, example_inputs=inputs, precision=None), *inputs)
    assert len(list(layers(prepare_saq(model, example_inputs=inputs)))) == 2 * 11
