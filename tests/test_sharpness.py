"""The tools of a sharpness-aware step, and the measures against explicit Hessians and closed forms."""

import contextlib
import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.errors import TrainingError
from saq_fx.sharpness import (
    Perturbation,
    RandomState,
    ascent_scale,
    curvature,
    global_norm,
    inner_product,
    lambda_max,
    perturbed,
    preserve_buffers,
    scaled_by_size,
    surrogate_gap,
)


def quadratic(eigenvalues: list[float]) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and a point."""
    basis, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64))
    matrix = basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T
    return matrix, torch.randn(len(eigenvalues), dtype=torch.float64, requires_grad=True)


def test_norm_and_inner_product_are_global() -> None:
    a = [torch.randn(3, 4), torch.randn(5), torch.randn(())]
    b = [torch.randn_like(t) for t in a]
    flat_a, flat_b = (torch.cat([t.flatten() for t in tensors]) for tensors in (a, b))
    torch.testing.assert_close(global_norm(a), flat_a.norm())
    torch.testing.assert_close(inner_product(a, b), flat_a @ flat_b)


def test_complex_numbers_count_as_pairs_of_real_ones() -> None:
    a, b = ([torch.randn(3, 4, dtype=torch.cfloat), torch.randn(5)] for _ in range(2))
    flat_a, flat_b = (torch.cat([torch.view_as_real(t).flatten(), u]) for t, u in (a, b))
    torch.testing.assert_close(global_norm(a), flat_a.norm())
    torch.testing.assert_close(inner_product(a, b), flat_a @ flat_b)
    scaled, norm = scaled_by_size(a, b)
    assert norm == pytest.approx(float((flat_a * flat_b).norm()))
    torch.testing.assert_close(torch.view_as_real(scaled[0]).flatten(), (flat_a * flat_b**2)[:24])


def test_inner_product_pairs_elements_whatever_their_layout() -> None:
    a = torch.randn(2, 3, 4, 4)
    b = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(
        inner_product([a.to(memory_format=torch.channels_last)], [b]), (a * b).sum(), rtol=1e-5, atol=1e-5
    )


def test_ascent_scale_gives_steps_of_the_radius_and_none_at_a_zero_gradient() -> None:
    gradient = torch.randn(7, dtype=torch.float64)
    assert (gradient * ascent_scale(float(gradient.norm()), 0.3)).norm() == pytest.approx(0.3)
    assert ascent_scale(0.0, 0.3) == 0


def test_perturbed_restores_bit_for_bit_also_after_an_error() -> None:
    parameters = [nn.Parameter(torch.randn(50)), nn.Parameter(torch.randn(3, 3))]
    before = [p.detach().clone() for p in parameters]
    directions = [torch.full_like(p, 1e8) for p in before]
    with contextlib.suppress(KeyError), perturbed(parameters, directions, 0.5):
        assert all(torch.equal(p, b + 5e7) for p, b in zip(parameters, before, strict=True))
        raise KeyError
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(p.requires_grad and p.is_leaf for p in parameters)


class Restless(nn.Module):
    """Changes its buffers in every way that modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("minimum", torch.zeros(()))
        self.register_buffer("lazy", None)

    def forward(self, x: Tensor) -> Tensor:
        self.minimum = x.detach().min()
        self.lazy = x.detach().clone()
        y: Tensor = self.norm(x)
        return y


def test_preserve_buffers_keeps_identity_and_value() -> None:
    module = Restless()
    module(torch.randn(8, 3))
    module.lazy = None
    held = dict(module.named_buffers())
    values = {name: buffer.clone() for name, buffer in held.items()}
    with preserve_buffers(module):
        module(5 + torch.randn(8, 3))
        assert not torch.equal(module.norm.running_mean, values["norm.running_mean"])
    assert dict(module.named_buffers()).keys() == held.keys()
    for name, buffer in module.named_buffers():
        assert buffer is held[name]
        assert torch.equal(buffer, values[name])


def test_random_state_is_replayed_and_the_generator_goes_on() -> None:
    state = RandomState([torch.zeros(1)])
    first = torch.rand(4)
    with state.replay():
        assert torch.equal(torch.rand(4), first)
        torch.rand(1000)
    after = torch.rand(4)
    torch.manual_seed(0)
    torch.rand(4)
    assert torch.equal(after, torch.rand(4))


def test_perturbation_adds_its_delta_and_never_copies_it() -> None:
    leaf, weight = Perturbation(), torch.randn(2, 3)
    assert leaf(weight) is weight
    leaf.delta = torch.ones(2, 3, requires_grad=True) * 2
    assert torch.equal(leaf(weight), weight + 2)
    assert copy.deepcopy(leaf).delta is None
    file = io.BytesIO()
    torch.save(leaf, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).delta is None
    assert not list(leaf.parameters())
    assert not leaf.state_dict()


@pytest.mark.parametrize("eigenvalues", [[5.0, 2.0, 1.0, -3.0], [1.0, 0.5, -4.0, -2.0], [-1.0, -2.0, -6.0]])
def test_lambda_max_of_a_quadratic(eigenvalues: list[float]) -> None:
    matrix, point = quadratic(eigenvalues)
    found = lambda_max(lambda _: point @ matrix @ point / 2, [0], [point], iterations=500, tolerance=1e-9)
    assert found.value == pytest.approx(max(eigenvalues), abs=1e-9)
    assert found.residual <= 1e-8


def test_a_large_negative_eigenvalue_does_not_loosen_the_tolerance() -> None:
    matrix, point = quadratic([-1000.0, 1.0, 0.4, -0.2])
    found = lambda_max(lambda _: point @ matrix @ point / 2, [0], [point], iterations=20000, tolerance=1e-3)
    assert found.residual <= 1e-3 * found.value
    assert found.value == pytest.approx(1.0, rel=1e-3)


def test_lambda_max_of_a_linear_loss_is_zero() -> None:
    point = torch.randn(4, requires_grad=True)
    assert lambda_max(lambda _: point.sum(), [0], [point]).value == 0


def small_network() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batches = [(torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))) for _ in range(3)]
    return net, batches


def test_lambda_max_of_a_network_equals_the_explicit_hessian() -> None:
    net, batches = small_network()
    parameters = list(net.parameters())
    names = [name for name, _ in net.named_parameters()]
    sizes = [p.numel() for p in parameters]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    def mean_loss(flat: Tensor) -> Tensor:
        split = [part.view_as(p) for part, p in zip(flat.split(sizes), parameters, strict=True)]
        values = dict(zip(names, split, strict=True))
        losses = [F.cross_entropy(torch.func.functional_call(net, values, (x,)), y) for x, y in batches]
        return torch.stack(losses).mean()

    flat = torch.cat([p.detach().flatten() for p in parameters])
    hessian = torch.autograd.functional.hessian(mean_loss, flat)
    expected = np.linalg.eigvalsh(hessian.numpy())
    found = lambda_max(loss, batches, parameters, iterations=2000, tolerance=1e-8)
    assert found.value == pytest.approx(expected[-1], rel=1e-10)
    rough = lambda_max(loss, batches, parameters, iterations=5)
    assert rough.iterations == 5
    assert np.abs(expected - rough.value).min() <= rough.residual
    assert all(p.grad is None for p in parameters)


def test_surrogate_gap_of_a_quadratic_is_its_closed_form() -> None:
    """L = x.Ax/2, g = Ax, e = rho g/|g|: h = rho |g| + e.Ae/2, exactly."""
    matrix, point = quadratic([3.0, 1.0, 0.5])
    before, gradient, rho = point.detach().clone(), matrix @ point.detach(), 0.2
    step = rho * gradient / gradient.norm()
    expected = rho * gradient.norm() + step @ matrix @ step / 2
    halves = [0.5, 1.5]  # the mean over the batches is the quadratic
    gap = surrogate_gap(lambda scale: scale * (point @ matrix @ point) / 2, halves, [point], rho)
    assert gap == pytest.approx(float(expected), rel=1e-12)
    assert torch.equal(point, before)


def test_curvature_of_a_quadratic_at_its_minimum() -> None:
    """At a minimum h = sigma rho**2 / 2 along the direction of ascent."""
    assert curvature(7.0 * 0.3**2 / 2, 0.3) == pytest.approx(7.0)


def test_a_flat_point_has_no_gap() -> None:
    point = torch.zeros(3, requires_grad=True)
    assert surrogate_gap(lambda _: (point**2).sum(), [0], [point], 0.5) == 0


def test_empty_samples_are_named() -> None:
    point = torch.zeros(3, requires_grad=True)
    with pytest.raises(TrainingError, match="needs batches"):
        lambda_max(lambda _: point.sum(), [], [point])
    with pytest.raises(TrainingError, match="needs parameters"):
        surrogate_gap(lambda _: point.sum(), [0], [], 0.1)
    assert math.isfinite(surrogate_gap(lambda _: point.sum(), [0], [point], 0.1))
