"""Mixtures over bit-widths against the sum written out."""

import pytest
import torch
from torch import nn

from saq_fx.errors import PrecisionError
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.quantizers import ClipActivationQuantizer, ClipWeightQuantizer, StepQuantizer

MAKERS = {
    "weights": lambda bits: ClipWeightQuantizer(bits, dtype=torch.double),
    "channels": lambda bits: ClipWeightQuantizer(bits, channels=4, dtype=torch.double),
    "activations": lambda bits: ClipActivationQuantizer(bits, dtype=torch.double),
    "steps": lambda bits: StepQuantizer(bits, signed=True, offset=True, dtype=torch.double),
}


def mixture(kind: str, bits: tuple[int, ...], logits: list[float]) -> MixtureQuantizer:
    return MixtureQuantizer([MAKERS[kind](b) for b in bits], nn.Parameter(torch.tensor(logits, dtype=torch.double)))


@pytest.mark.parametrize("kind", MAKERS)
def test_values_and_gradients_are_those_of_the_sum(kind: str) -> None:
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    grad = torch.randn(4, 6, dtype=torch.double)
    mixed = mixture(kind, (2, 3, 6), [0.3, -0.2, 1.0])
    mixed.temperature = 0.7
    inputs = [x, *mixed.parameters()]
    actual = torch.autograd.grad(mixed(x), inputs, grad)
    weights = torch.exp(mixed.logits / 0.7) / torch.exp(mixed.logits / 0.7).sum()
    expected = sum(weight * quantizer(x) for weight, quantizer in zip(weights, mixed.quantizers, strict=True))
    assert torch.allclose(mixed(x), expected, rtol=0, atol=1e-12)
    for got, wanted in zip(actual, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MAKERS)
def test_one_candidate_is_its_quantizer(kind: str) -> None:
    mixed = mixture(kind, (3,), [0.4])
    x = torch.randn(4, 6, dtype=torch.double)
    assert torch.equal(mixed(x), mixed.quantizers[0](x))


def test_expected_bits() -> None:
    mixed = mixture("weights", (2, 4), [0.0, 0.0])
    assert mixed.expected_bits().item() == 3.0
    assert mixed.candidates == (2, 4)


@pytest.mark.parametrize(("bits", "logits"), [((2, 2), [0.0, 0.0]), ((2, 32), [0.0, 0.0]), ((2, 3), [0.0]), ((), [])])
def test_bad_candidates_are_named(bits: tuple[int, ...], logits: list[float]) -> None:
    with pytest.raises(PrecisionError, match="different widths"):
        mixture("weights", bits, logits)
