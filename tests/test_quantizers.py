"""Quantizers against closed forms in float64: values and every gradient, ties and clipped ends included."""

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor, nn

from saq_fx.errors import CalibrationError, PrecisionError
from saq_fx.fake_quantization import clip_activation, clip_weight, integer_range, lsq, lsq_plus
from saq_fx.quantizers import ClipActivationQuantizer, ClipWeightQuantizer, Quantizer, StepQuantizer, initialize_all

Array = NDArray[np.float64]
BITS = st.integers(2, 8)
LEVELS = st.sampled_from([0.25, 0.5, 1.0, 1.75, 3.0])
TENSORS = hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-4, 4, width=32))


def with_special_points(values: Array, level: float, steps: int) -> Array:
    """The drawn values, the clipped ends, zero, and points half-way between two levels."""
    halves = (np.arange(-steps, steps + 1, max(1, steps // 8)) + 0.5) / steps * level
    return np.concatenate([values, [level, -level, 0.0, 2 * level, -2 * level], halves])


def gradients(function: Any, x: Array, levels: list[float], grad: Array) -> list[Array]:
    tensors = [torch.tensor(x, requires_grad=True)]
    tensors += [torch.tensor(level, dtype=torch.double, requires_grad=True) for level in levels]
    output = function(*tensors)
    found = torch.autograd.grad(output, tensors, torch.tensor(grad))
    return [output.detach().numpy(), *(each.numpy() for each in found)]


def assert_all_close(actual: list[Array], expected: list[Any]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@given(TENSORS, LEVELS, BITS)
def test_clip_weight(values: Array, level: float, bits: int) -> None:
    n = 2**bits - 1
    w = with_special_points(values, level, n)
    grad = np.cos(np.arange(w.size))
    w_bar = np.round((np.clip(w / level, -1, 1) + 1) / 2 * n) / n
    q = level * (2 * w_bar - 1)
    inside = np.abs(w) <= level
    d_level = np.sum(grad * np.where(inside, q / level - w / level, np.sign(w)))
    actual = gradients(lambda w, a: clip_weight(w, a, bits), w, [level], grad)
    assert_all_close(actual, [q, grad * inside, d_level])
    assert len(np.unique(np.round(q / level, 9))) <= 2**bits


@given(TENSORS, LEVELS, BITS)
def test_clip_activation(values: Array, level: float, bits: int) -> None:
    n = 2**bits - 1
    x = with_special_points(values, level, n)
    grad = np.cos(np.arange(x.size))
    q = level * np.round(np.clip(x / level, 0, 1) * n) / n
    inside = (x > 0) & (x < level)
    d_level = np.sum(grad * np.where(inside, q / level - x / level, (x >= level).astype(float)))
    actual = gradients(lambda x, a: clip_activation(x, a, bits), x, [level], grad)
    assert_all_close(actual, [q, grad * inside, d_level])


@given(TENSORS, LEVELS, BITS, st.booleans(), st.sampled_from([None, 0.0, -0.5, 0.75]))
def test_steps(values: Array, step: float, bits: int, signed: bool, offset: float | None) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    ends = np.array([low, high, low - 1, high + 1, 0.5, 1.5, -0.5]) * step
    x = np.concatenate([values, ends]) + (offset or 0.0)
    grad = np.cos(np.arange(x.size))
    v = (x - (offset or 0.0)) / step
    inside = (v > low) & (v < high)
    rounded = np.clip(np.round(v), low, high)
    scale = 1 / np.sqrt(x.size * high)
    d_step = np.sum(grad * np.where(inside, rounded - v, rounded)) * scale
    if offset is None:
        actual = gradients(lambda x, s: lsq(x, s, bits, signed), x, [step], grad)
        assert_all_close(actual, [rounded * step, grad * inside, d_step])
    else:
        actual = gradients(lambda x, s, o: lsq_plus(x, s, o, bits, signed), x, [step, offset], grad)
        d_offset = np.sum(grad * ~inside) * scale
        assert_all_close(actual, [rounded * step + offset, grad * inside, d_step, d_offset])


MODULES = {
    "clip weight": lambda bits, **kw: ClipWeightQuantizer(bits, **kw),
    "clip weight, normalized": lambda bits, **kw: ClipWeightQuantizer(bits, normalize=True, **kw),
    "clip weight, channels": lambda bits, **kw: ClipWeightQuantizer(bits, channels=3, **kw),
    "clip activation": lambda bits, **kw: ClipActivationQuantizer(bits, **kw),
    "lsq weight, channels": lambda bits, **kw: StepQuantizer(bits, signed=True, channels=4, channel_axis=-1, **kw),
    "lsq unsigned": lambda bits, **kw: StepQuantizer(bits, signed=False, **kw),
    "lsq+": lambda bits, **kw: StepQuantizer(bits, signed=True, offset=True, **kw),
}


def data() -> Tensor:
    return torch.randn(3, 5, 4)


@pytest.mark.parametrize("kind", MODULES)
def test_state_survives_every_copy(kind: str) -> None:
    quantizer: Quantizer = MODULES[kind](3)
    x = data()
    expected = quantizer(x)
    fresh = MODULES[kind](5)
    fresh.load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh):
        assert other.bits == 3
        assert torch.equal(other(2 * x), quantizer(2 * x)), "no level is fitted again"
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("kind", MODULES)
def test_codes_are_the_places_of_the_values_on_their_grid(kind: str, bits: int) -> None:
    quantizer: Quantizer = MODULES[kind](bits)
    x = data()
    values, codes = quantizer(x).detach(), quantizer.codes(x)
    assert codes.dtype == torch.int32
    low, high = integer_range(bits, signed=isinstance(quantizer, StepQuantizer) and quantizer.signed)
    assert low <= int(codes.min())
    assert int(codes.max()) <= high
    axis = quantizer.channel_axis if quantizer.level.numel() > 1 else None  # type: ignore[attr-defined]
    for row, of_row in zip(*((t.unbind(axis) if axis is not None else [t]) for t in (values, codes)), strict=True):
        line = np.polyfit(of_row.flatten().numpy(), row.flatten().numpy(), 1)
        np.testing.assert_allclose(np.polyval(line, of_row), row, atol=1e-5)
        assert line[0] > 0


@pytest.mark.parametrize("kind", MODULES)
def test_a_state_without_it_has_the_levels_fitted_anew(kind: str) -> None:
    holder = nn.Module()
    holder.quantizer = MODULES[kind](3)
    x = data()
    expected = holder.quantizer(x)
    holder.quantizer(2 * x)
    holder.load_state_dict({})
    assert not holder.quantizer.initialized
    holder.quantizer(2 * x)
    holder.load_state_dict({})
    assert torch.equal(holder.quantizer(x), expected)


@pytest.mark.parametrize("kind", MODULES)
def test_fitted_levels_are_near_the_best(kind: str) -> None:
    quantizer = MODULES[kind](3)
    x = data().double()
    quantizer = quantizer.double()
    error = (quantizer(x) - x).square().sum()
    level = quantizer.level.detach().clone()
    least = error
    for factor in torch.linspace(0.3, 2.0, 200, dtype=torch.double):
        quantizer.level.data = level * factor
        least = torch.minimum(least, (quantizer(x) - x).square().sum())
    assert error <= 1.05 * least


@pytest.mark.parametrize("kind", MODULES)
def test_types_and_hessian_products(kind: str) -> None:
    quantizer = MODULES[kind](4)
    x = data().requires_grad_()
    quantizer(x)
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    weight = torch.randn(4, requires_grad=True)
    loss = (quantizer(x * weight).sum(1).square()).sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (product,) = torch.autograd.grad(gradient.sum(), weight)
    assert torch.isfinite(product).all()
    compiled = torch.compile(quantizer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), quantizer(x))


@pytest.mark.parametrize("kind", MODULES)
def test_a_collapsed_level_is_held_and_can_grow_again(kind: str) -> None:
    quantizer = MODULES[kind](4)
    x = data()
    quantizer(x)
    fitted = quantizer.level.detach().clone()
    quantizer.level.data.fill_(-1e12)
    assert torch.allclose(quantizer.guarded_level(), 0.1 * fitted)
    quantizer(x).square().sum().backward()
    assert (quantizer.level.grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: StepQuantizer(4, signed=True, dtype=dtype),
        lambda dtype: StepQuantizer(4, signed=True, offset=True, dtype=dtype),
        lambda dtype: ClipActivationQuantizer(4, dtype=dtype),
    ],
)
def test_values_near_the_smallest_number_stay_finite(make: Any, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, 3.0, -2.0], dtype=dtype) * torch.finfo(dtype).smallest_normal / 8
    x.requires_grad_()
    quantizer = make(dtype)
    y = quantizer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(each.grad.isfinite().all() for each in (x, *quantizer.parameters()))


def test_float_bits_are_the_identity() -> None:
    quantizer = ClipActivationQuantizer(32)
    x = data()
    assert quantizer(x) is x
    assert not quantizer.initialized


def test_changed_bits_have_the_levels_fitted_anew() -> None:
    quantizer = ClipWeightQuantizer(8)
    x = data()
    eight = quantizer(x)
    quantizer.set_bits(8)
    assert quantizer.initialized
    quantizer.set_bits(2)
    assert len(quantizer(x).unique()) == 4
    assert not torch.equal(quantizer(x), eight)


@pytest.mark.parametrize("method", ["mse", "max", "percentile"])
@pytest.mark.parametrize("kind", MODULES)
def test_degenerate_data(kind: str, method: str) -> None:
    quantizer = MODULES[kind](2)
    quantizer.initialize(torch.zeros(3, 5, 4), method)
    assert (quantizer.smallest_level > 0).all()
    assert torch.isfinite(quantizer(data())).all()
    quantizer.initialize(torch.full((3, 5, 4), 0.5), method)
    assert torch.isfinite(quantizer(data())).all()
    with pytest.raises(CalibrationError, match="not finite"):
        quantizer.initialize(torch.tensor([1.0, float("inf")]), method)


@pytest.mark.parametrize("method", ["mse", "max", "percentile"])
def test_many_are_initialized_as_each_by_itself(method: str) -> None:
    together = [make(bits) for make in MODULES.values() for bits in (2, 4, 4, 32)]
    alone = copy.deepcopy(together)
    tensors = [data() * scale for scale, _ in enumerate(together)]
    tensors[5], tensors[9] = torch.randn(3, 500, 40), torch.full((3, 5, 4), float("nan"))
    for index, dtype in ((1, torch.half), (2, torch.double)):  # of one grid
        together[index], alone[index] = together[index].to(dtype), alone[index].to(dtype)
        tensors[index] = tensors[index].to(dtype)
    assert initialize_all(zip(together, tensors, strict=True), method) == [together[9]]
    for index, (one, other, x) in enumerate(zip(together, alone, tensors, strict=True)):
        if index != 9:
            other.initialize(x, method)
        torch.testing.assert_close(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("bits", [0, 1, 9, 16, 33])
def test_bad_bits_are_named(bits: int) -> None:
    with pytest.raises(PrecisionError, match=f"{bits} bits"):
        ClipWeightQuantizer(bits)


@pytest.mark.parametrize("kind", [each for each in MODULES if "channels" not in each])
def test_a_batch_of_no_samples_moves_nothing(kind: str) -> None:
    quantizer, empty = MODULES[kind](4), torch.randn(0, 5, 4, requires_grad=True)
    quantizer(empty)
    assert not quantizer.initialized  # there is nothing to fit levels to
    quantizer(data())
    quantizer(empty).sum().backward()
    assert quantizer.level.grad is not None
    assert not quantizer.level.grad.any()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 5, 4)
