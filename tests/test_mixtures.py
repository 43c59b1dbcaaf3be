"""Mixtures over bit-widths against the sum written out."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from saq_fx.errors import PrecisionError
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.quantizers import ClipActivationQuantizer, ClipWeightQuantizer, Quantizer, StepQuantizer

MAKERS: dict[str, Callable[[int], Quantizer]] = {
    "normalized weights": lambda bits: ClipWeightQuantizer(bits, normalize=True, dtype=torch.double),
    "signed steps": lambda bits: StepQuantizer(bits, signed=True, dtype=torch.double),
    "unsigned steps": lambda bits: StepQuantizer(bits, signed=False, dtype=torch.double),
    "weights": lambda bits: ClipWeightQuantizer(bits, dtype=torch.double),
    "channels": lambda bits: ClipWeightQuantizer(bits, channels=4, dtype=torch.double),
    "activations": lambda bits: ClipActivationQuantizer(bits, dtype=torch.double),
    "steps": lambda bits: StepQuantizer(bits, signed=True, offset=True, dtype=torch.double),
}


def mixture(kind: str, bits: tuple[int, ...], logits: list[float]) -> MixtureQuantizer:
    return MixtureQuantizer([MAKERS[kind](b) for b in bits], nn.Parameter(torch.tensor(logits, dtype=torch.double)))


def written_out(mixed: MixtureQuantizer, x: Tensor) -> Tensor:
    weights = torch.exp(mixed.logits / mixed.temperature)
    weights = weights / weights.sum()
    return torch.stack([w * quantizer(x) for w, quantizer in zip(weights, mixed.quantizers, strict=True)]).sum(0)


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 1e-12) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=atol)


@pytest.mark.parametrize("shape", [(4, 6), (4, 50001)], ids=["one block", "several blocks"])
@pytest.mark.parametrize("kind", MAKERS)
def test_values_and_gradients_are_those_of_the_sum(kind: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.double)
    grad = torch.randn(shape, dtype=torch.double)
    mixed = mixture(kind, (2, 3, 6, 8), [0.3, -0.2, 1.0, 0.1])
    mixed.temperature = 0.7
    mixed(x)
    end = mixed.quantizers[1].level.detach().flatten()[0]
    x[0, :3] = torch.stack([end, -end, torch.zeros_like(end)])
    inputs = [x.requires_grad_(), *mixed.parameters()]
    output, expected = mixed(x), written_out(mixed, x)
    atol = 1e-12 * math.sqrt(x.numel())
    assert_all_close([output], [expected])
    assert_all_close(torch.autograd.grad(output, inputs, grad), torch.autograd.grad(expected, inputs, grad), atol)


@pytest.mark.parametrize("kind", MAKERS)
def test_second_derivatives_are_those_of_the_sum(kind: str) -> None:
    x = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    mixed = mixture(kind, (2, 3, 6), [0.3, -0.2, 1.0])
    inputs = [x, *mixed.parameters()]

    def second(output: Tensor) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(torch.stack([each.square().sum() for each in gradients]).sum(), inputs)

    assert_all_close(second(mixed(x)), second(written_out(mixed, x)))


def test_compiled_is_the_same() -> None:
    mixed = mixture("weights", (2, 3, 6), [0.3, -0.2, 1.0])
    x = torch.randn(4, 6, dtype=torch.double)
    expected = mixed(x)
    assert_all_close([torch.compile(mixed, backend="eager", fullgraph=True)(x)], [expected])


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


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_a_constant_weight_is_mixed_like_any_other(dtype: torch.dtype) -> None:
    quantizers = [ClipWeightQuantizer(bits, normalize=True, dtype=dtype) for bits in (2, 3, 4)]
    mixed = MixtureQuantizer(quantizers, nn.Parameter(torch.zeros(3, dtype=dtype)))
    for x in (torch.zeros(4, 5, dtype=dtype), torch.full((1,), 0.3, dtype=dtype)):
        x.requires_grad_()
        y = mixed(x)
        assert y.abs().max() < 1e-15  # as normalized: what is constant is no signal
        y.sum().backward()
        assert all(torch.isfinite(each.grad).all() for each in (x, mixed.logits, *mixed.parameters()))


def test_a_batch_of_no_samples_moves_nothing() -> None:
    mixed = mixture("steps", (2, 4), [0.3, -0.2])
    mixed(torch.randn(4, 6, dtype=torch.double))
    mixed(torch.randn(0, 6, dtype=torch.double, requires_grad=True)).sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in mixed.parameters())
