"""Expected gains: the formulas written out, exact where there is no noise, closer to the truth where there is."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from saq_fx.gains import expected_gains

BITS = (2, 3, 4, 6)
SHAPE = np.array([1.0, 0.4, 0.2, 0.0])

Steps = NDArray[np.float64]
"""Gains over the widest candidate, (mixtures, steps, candidates)."""


def totals(steps: Steps) -> list[Tensor]:
    return [torch.tensor(np.stack([each.sum(0), (each**2).sum(0)])) for each in steps]


def expected(steps: Steps, bits: tuple[int, ...] = BITS) -> Steps:
    found = expected_gains(totals(steps), [bits] * len(steps), steps.shape[1])
    return torch.stack(found).numpy()


def drawn(mixtures: int, steps: int, noise: float, departure: float = 0.0, seed: int = 0) -> tuple[Steps, Steps]:
    """True gains of the widths, and those of steps."""
    rng = np.random.default_rng(seed)
    size = (mixtures, len(BITS))
    truth = -rng.lognormal(sigma=0.8, size=(mixtures, 1)) * SHAPE * (1 + departure * rng.normal(size=size))
    return truth, truth[:, None] + noise * np.sqrt(SHAPE) * rng.normal(size=(mixtures, steps, len(BITS)))


def by_formulas(steps: Steps) -> Steps:
    """The formulas of `expected_gains`, for widths of which the last is the widest."""
    mixtures, count, candidates = steps.shape
    widths = range(candidates - 1)
    m = [[steps[j, :, b].mean() for b in widths] for j in range(mixtures)]
    v = [[steps[j, :, b].var(ddof=1) / count for b in widths] for j in range(mixtures)]
    s = [sum(m[j][b] for j in range(mixtures)) for b in widths]
    fit, misfit, signal = [], 0.0, 0.0
    for j in range(mixtures):
        c = sum(m[j][b] * s[b] / v[j][b] for b in widths) / sum(s[b] ** 2 / v[j][b] for b in widths)
        fit.append([max(0.0, c) * s[b] for b in widths])
        misfit += sum((m[j][b] - fit[j][b]) ** 2 / v[j][b] for b in widths)
        signal += sum(s[b] ** 2 / v[j][b] for b in widths)
    t2 = max(0.0, misfit - (mixtures - 1) * (len(widths) - 1)) / signal
    found = np.zeros((mixtures, candidates))
    for j in range(mixtures):
        for b in widths:
            found[j, b] = fit[j][b] + (m[j][b] - fit[j][b]) * t2 * s[b] ** 2 / (t2 * s[b] ** 2 + v[j][b])
    return found


@pytest.mark.parametrize(("departure", "seed"), [(0.0, 1), (0.5, 0)])
def test_the_gains_are_those_of_the_formulas(departure: float, seed: int) -> None:
    _, steps = drawn(5, 30, 1.5, departure, seed)
    np.testing.assert_allclose(expected(steps), by_formulas(steps), rtol=1e-9)


@pytest.mark.parametrize(("departure", "share"), [(0.0, 0.5), (0.2, 0.7), (0.5, 0.9)])
def test_they_are_closer_to_the_truth_than_the_mean(departure: float, share: float) -> None:
    errors = []
    for seed in range(20):
        truth, steps = drawn(30, 100, 4.0, departure, seed)
        errors.append([float(((found - truth) ** 2).sum()) for found in (expected(steps), steps.mean(1))])
    shrunk, mean = np.mean(errors, 0)
    assert shrunk < share * mean


def test_after_many_steps_they_are_the_mean() -> None:
    _, steps = drawn(5, 20_000, 1.0, departure=0.5)
    np.testing.assert_allclose(expected(steps), steps.mean(1), atol=0.02)


@pytest.mark.parametrize("steps", [drawn(5, 1, 1.0)[1], np.repeat(drawn(5, 1, 1.0)[1], 8, axis=1)])
def test_without_noise_to_be_told_they_are_the_mean(steps: Steps) -> None:
    np.testing.assert_allclose(expected(steps), steps.mean(1), rtol=1e-6, atol=1e-9)


def test_a_mixture_by_itself_has_its_mean() -> None:
    _, steps = drawn(1, 10, 2.0)
    np.testing.assert_allclose(expected(steps), steps.mean(1))


def test_the_order_of_widths_does_not_matter_and_other_widths_are_apart() -> None:
    _, steps = drawn(4, 20, 2.0)
    order = [3, 0, 2, 1]
    np.testing.assert_allclose(
        expected(steps[:, :, order], tuple(BITS[each] for each in order)), expected(steps)[:, order], atol=1e-12
    )
    other = np.random.default_rng(1).normal(size=(20, 2)) * [1, 0]
    together = expected_gains([*totals(steps), *totals(other[None])], [*[BITS] * 4, (2, 8)], 20)
    np.testing.assert_allclose(torch.stack(together[:4]), expected(steps))
    np.testing.assert_allclose(together[4], other.mean(0))


def test_gains_of_nothing_are_zero() -> None:
    assert not expected(np.zeros((3, 5, 4))).any()
    assert not expected_gains([torch.zeros(2, 1)], [(4,)], 3)[0].any()
