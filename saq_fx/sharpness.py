"""Sharpness on plain torch modules: the tools of a sharpness-aware step, and measures of a minimum."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from saq_fx.errors import TrainingError

Batch = TypeVar("Batch")
Tensors = list[Tensor] | tuple[Tensor, ...]


class Perturbation(nn.Module):
    """Adds `delta` to a weight while a sharpness-aware step runs; the identity otherwise.

    `delta` has the shape of the weight. It is neither a parameter nor a buffer: no optimizer updates it, no
    state dict or copy holds it, no data-parallel worker broadcasts it.
    """

    delta: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.delta = None

    def forward(self, weight: Tensor) -> Tensor:
        """`weight + delta`, of the same shape."""
        return weight if self.delta is None else weight + self.delta

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "delta": None}


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all tensors taken as one vector, a 0-d tensor."""
    return torch.nn.utils.get_total_norm([_wide(tensor) for tensor in tensors])


def inner_product(first: Iterable[Tensor], second: Iterable[Tensor]) -> Tensor:
    """Inner product of two lists of tensors, each taken as one vector, a 0-d tensor."""
    pairs = zip(first, second, strict=True)
    return torch.stack([torch.dot(_wide(a).flatten(), _wide(b).flatten()) for a, b in pairs]).sum()


def _wide(tensor: Tensor) -> Tensor:
    """As real numbers, in single precision if it has less: sums of squares overflow in half precision."""
    tensor = _real(tensor)
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, by which they are perturbed."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def ascent_scale(norm: float, radius: float) -> float:
    """`radius / norm`, by which a gradient of that norm becomes a step of length `radius`; 0 for norm 0."""
    return radius / norm if norm else 0.0


@contextmanager
def perturbed(parameters: Tensors, directions: Tensors, scale: float) -> Iterator[None]:
    """Adds `scale * directions` in place; on leaving, the parameters are what they were, bit for bit."""
    if not parameters:
        yield
        return
    with torch.no_grad():
        saved = [parameter.clone() for parameter in parameters]
        torch._foreach_add_(parameters, directions, alpha=scale)
    try:
        yield
    finally:
        # Subtracting what was added would leave rounding errors.
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)


class Ascent(NamedTuple):
    """What a perturbation moves: leaves of quantized weights and, in place, parameters; where to, and its norm."""

    deltas: list[Tensor]
    directions: list[Tensor]
    in_place: list[Tensor]
    in_place_directions: list[Tensor]
    norm: float

    @contextmanager
    def climbed(self, rho: float) -> Iterator[None]:
        """Inside, everything is moved to the distance rho; on leaving, parameters are back, bit for bit."""
        scale = ascent_scale(self.norm, rho)
        if self.deltas:
            torch._foreach_add_(self.deltas, self.directions, alpha=scale)
        with perturbed(self.in_place, self.in_place_directions, scale):
            torch.clear_autocast_cache()  # it would go on with what the parameters were
            yield
        torch.clear_autocast_cache()


def scaled_by_size(gradients: Tensors, values: Tensors) -> tuple[list[Tensor], float]:
    """`v**2 g` and `||v g||`, of gradients g at values v (ASAM, ICML 2021, Eq. 8)."""
    factors = [_real(value) for value in values]
    scaled = torch._foreach_mul([_real(gradient) for gradient in gradients], factors)
    directions = zip(torch._foreach_mul(scaled, factors), gradients, strict=True)
    return [_like(direction, gradient) for direction, gradient in directions], float(global_norm(scaled))


def _like(numbers: Tensor, tensor: Tensor) -> Tensor:
    """What `_real` has made of such a tensor, turned back."""
    return torch.view_as_complex(numbers) if tensor.is_complex() else numbers


class Buffers:
    """The buffers of a module (statistics, counters, observers) as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._owners = {owner: dict(owner._buffers) for owner in module.modules()}
        held = [buffer for buffers in self._owners.values() for buffer in buffers.values() if buffer is not None]
        # Nothing can write to an expanded buffer, which shares memory among its elements; sparse ones are replaced.
        self._buffers = [buffer for buffer in held if buffer.layout is torch.strided and 0 not in buffer.stride()]
        self._saved = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Makes every buffer what it was, bit for bit."""
        for owner, buffers in self._owners.items():
            owner._buffers.clear()
            owner._buffers.update(buffers)
        if self._buffers:
            # As data: what an earlier forward keeps of them for its gradients is right again, and must count as such.
            torch._foreach_copy_([buffer.data for buffer in self._buffers], self._saved)


@contextmanager
def preserve_buffers(module: nn.Module) -> Iterator[None]:
    """On leaving, every buffer of `module` is what it was, bit for bit."""
    buffers = Buffers(module)
    try:
        yield
    finally:
        buffers.restore()


class HostRandom:
    """The generators of Python and numpy as they are now."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()

    def put_back(self) -> bool:
        """Makes the generators what they were; whether they were drawn from."""
        numpy: Any = np.random.get_state()
        same = numpy[2:] == self._numpy[2:] and numpy[1].tobytes() == self._numpy[1].tobytes()
        if same and random.getstate() == self._python:
            return False
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        return True


class RandomState:
    """The random generators of torch on the CPU and the CUDA devices that hold `tensors`, of Python and of numpy."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._host = HostRandom()
        self._cpu = torch.get_rng_state()
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._cuda = {device.index: torch.cuda.get_rng_state(device) for device in devices}

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, random numbers are drawn from this state; afterwards the generators go on as before."""
        now = HostRandom()
        with torch.random.fork_rng(devices=list(self._cuda)):
            torch.set_rng_state(self._cpu)
            for device, state in self._cuda.items():
                torch.cuda.set_rng_state(state, device)
            self._host.put_back()
            try:
                yield
            finally:
                now.put_back()


@dataclass(frozen=True)
class Eigenvalue:
    """An estimate by power iteration: an eigenvalue lies within `residual` = ||Hv - value v|| of `value`."""

    value: float
    residual: float
    iterations: int


def lambda_max(
    loss: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    parameters: Iterable[Tensor],
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian of the mean loss, by power iteration (SAQ, Sec. 5).

    Power iteration finds the eigenvalue of largest magnitude; where that one is negative, a second run on the
    Hessian shifted by it finds the largest. Put modules in eval mode first, so that the loss is a function of
    the parameters.

    Args:
        loss: mean loss of one batch.
        batches: a fixed sample, in batches of equal size.
        parameters: what the Hessian is taken with respect to.
        iterations: at most so many Hessian-vector products per run.
        tolerance: stops once the residual is below this share of the eigenvalue.

    Raises:
        TrainingError: no batches or no parameters.
    """
    parameters = tuple(parameters)
    _check_sample(batches, parameters)

    def product(vector: Tensors) -> list[Tensor]:
        return _hessian_product(loss, batches, parameters, vector)

    found = _power_iteration(product, parameters, iterations, tolerance)
    if found.value >= 0:
        return found
    lowest = found.value

    def shifted(vector: Tensors) -> list[Tensor]:
        return list(torch._foreach_sub(product(vector), torch._foreach_mul(vector, lowest)))

    found = _power_iteration(shifted, parameters, iterations, tolerance, shift=lowest)
    return Eigenvalue(found.value + lowest, found.residual, found.iterations)


def _power_iteration(
    product: Callable[[Tensors], list[Tensor]],
    like: Tensors,
    iterations: int,
    tolerance: float,
    shift: float = 0.0,
) -> Eigenvalue:
    """The eigenvalue of largest magnitude of a symmetric operator, from a fixed random start.

    The residual falls below `tolerance` times the eigenvalue, with `shift` added to it.
    """
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device) for t in like]
    value, residual, count = 0.0, float("inf"), 0
    while count < iterations and residual > tolerance * abs(value + shift):
        torch._foreach_mul_(vector, ascent_scale(float(global_norm(vector)), 1.0))
        image = product(vector)
        value = float(inner_product(vector, image))
        residual = float(global_norm(torch._foreach_sub(image, torch._foreach_mul(vector, value))))
        vector = image
        count += 1
    return Eigenvalue(value, residual, count)


def _hessian_product(
    loss: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    parameters: Tensors,
    vector: Tensors,
) -> list[Tensor]:
    """Hv of the mean loss over the batches, by differentiating the inner product of gradient and v."""
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        gradients = torch.autograd.grad(loss(batch), parameters, create_graph=True, materialize_grads=True)
        slope = inner_product(gradients, vector)
        if slope.requires_grad:  # else the loss is linear in the parameters
            part = torch.autograd.grad(slope, parameters, materialize_grads=True)
            torch._foreach_add_(total, part, alpha=1 / len(batches))
    return total


def surrogate_gap(
    loss: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    parameters: Iterable[Tensor],
    rho: float,
) -> float:
    """`h = L(theta + rho g/||g||) - L(theta)` of the mean loss over fixed batches (GSAM, ICLR 2022).

    Put modules in eval mode first, so that the loss is a function of the parameters.

    Raises:
        TrainingError: no batches or no parameters.
    """
    parameters = tuple(parameters)
    _check_sample(batches, parameters)
    value, gradient = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        part = loss(batch)
        value += float(part.detach())
        torch._foreach_add_(gradient, torch.autograd.grad(part, parameters, materialize_grads=True))
    with perturbed(parameters, gradient, ascent_scale(float(global_norm(gradient)), rho)), torch.no_grad():
        above = sum(float(loss(batch)) for batch in batches)
    return (above - value) / len(batches)


def curvature(gap: float, rho: float) -> float:
    """`sigma = 2h / rho**2`: the curvature along the gradient, from a surrogate gap (GSAM, ICLR 2022)."""
    return 2 * gap / rho**2


def _check_sample(batches: Sequence[Any], parameters: Tensors) -> None:
    for name, values in (("batches", batches), ("parameters", parameters)):
        if not values:
            raise TrainingError(f"a measure of sharpness needs {name}, and the list given is empty")
