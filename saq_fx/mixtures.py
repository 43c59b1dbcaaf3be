"""Mixtures over bit-widths: what the search puts in the place of a quantizer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saq_fx.errors import PrecisionError
from saq_fx.precision import FLOAT_BITS
from saq_fx.quantizers import (
    ClipActivationQuantizer,
    ClipWeightQuantizer,
    Quantizer,
    StepQuantizer,
    clip_activation,
    clip_weight,
    deviation,
    guarded,
    integer_range,
    lsq,
    lsq_plus,
)

_BLOCK = 2**16
"""Elements that are worked on together: few enough for the cache of a core, enough to hide the cost of a call."""


class HeldMixture:
    """What a mixture gave at the first of several passes: a leaf that the others see too, and that may be moved.

    So a step with two passes mixes once, and its gradients go back through the mixture once. The leaf and its
    gradient keep their memory from step to step, for new memory costs more than the arithmetic.
    """

    def __init__(self) -> None:
        self.leaf: Tensor | None = None
        self.mixed: Tensor | None = None

    def first_of(self, mixture: "MixtureQuantizer", x: Tensor) -> Tensor:
        """The leaf, of the value that the mixture of `x` had when this was first asked since `release`."""
        if self.mixed is None:
            memory = self.leaf
            fits = memory is not None and (memory.shape, memory.dtype, memory.device) == (x.shape, x.dtype, x.device)
            self.mixed = mixture.mix(x, memory.detach() if memory is not None and fits else None)
            if memory is None or self.mixed.data_ptr() != memory.data_ptr():
                self.leaf = self.mixed.detach().requires_grad_()
        assert self.leaf is not None
        return self.leaf

    def release(self) -> None:
        """The next forward mixes anew."""
        self.mixed = None


class MixtureQuantizer(nn.Module):
    """`sum_b softmax(z/T)_b Q_b(x)`: every candidate width at once, each with its own levels (EdMIPS, Sec. 4).

    On a CPU, levels per tensor are mixed block by block, and only `x` is kept for the gradients: `_Mix`.

    Args:
        quantizers: one candidate for each width, of different widths, none of them float, otherwise alike.
        logits: z, of shape (candidates,); several mixtures that share a choice are given the same parameter.

    Raises:
        PrecisionError: the candidates' widths repeat, one is float, or the logits are of another number.
    """

    def __init__(self, quantizers: Sequence[Quantizer], logits: nn.Parameter) -> None:
        super().__init__()
        bits = [quantizer.bits for quantizer in quantizers]
        if not bits or len(set(bits)) < len(bits) or FLOAT_BITS in bits or logits.shape != (len(bits),):
            raise PrecisionError(
                f"a mixture of {bits} bits with logits of shape {tuple(logits.shape)}: give different widths of 2 to "
                "8 bits and one logit for each"
            )
        self.quantizers = nn.ModuleList(quantizers)
        self.logits = logits
        self.temperature = 1.0
        self.held: HeldMixture | None = None

    @property
    def candidates(self) -> tuple[int, ...]:
        """Bits of each candidate."""
        return tuple(int(quantizer.bits) for quantizer in self.quantizers)  # type: ignore[arg-type]

    def probabilities(self) -> Tensor:
        """How much of each candidate is in the mixture, (candidates,)."""
        return (self.logits / self.temperature).softmax(0)

    def expected_bits(self) -> Tensor:
        """`sum_b p_b b`, a 0-d tensor."""
        probabilities = self.probabilities()
        return (probabilities * probabilities.new_tensor(self.candidates)).sum()

    def forward(self, x: Tensor) -> Tensor:
        """The mixture of the quantized tensors, of the shape and type of `x`; what is held of it, if anything."""
        return self.mix(x) if self.held is None else self.held.first_of(self, x)

    def mix(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """The mixture of the quantized tensors; written to `memory`, of the shape and type of `x`, where possible."""
        if self._mixes_by_blocks(x):
            return self._mix_by_blocks(x, memory)
        weights = self.probabilities().to(x.dtype)
        first, *others = self.quantizers
        mixed: Tensor = weights[0] * first(x)
        for weight, quantizer in zip(weights[1:], others, strict=True):
            mixed = torch.addcmul(mixed, weight, quantizer(x))
        return mixed

    def _mixes_by_blocks(self, x: Tensor) -> bool:
        level: Any = self.quantizers[0].level
        return (
            len(self.quantizers) > 1
            and not torch.compiler.is_compiling()
            and x.is_cpu
            and x.dtype == level.dtype
            and x.dtype in (torch.float, torch.double)
            and level.dim() == 0
        )

    def _mix_by_blocks(self, x: Tensor, memory: Tensor | None) -> Tensor:
        quantizers: list[Any] = list(self.quantizers)
        for quantizer in quantizers:
            if not quantizer.initialized:
                quantizer.initialize(x.detach())
        smallest = torch.stack([quantizer.smallest_level for quantizer in quantizers])
        levels = guarded(torch.stack([quantizer.level for quantizer in quantizers]), smallest)
        center = 0.0
        if getattr(quantizers[0], "normalize", False):
            mean = x.detach().mean()
            center, std = float(mean), deviation(torch.sub(x.detach(), mean, out=memory))
            levels = levels * std
        offset = getattr(quantizers[0], "offset", None)
        offsets = None if offset is None else torch.stack([quantizer.offset for quantizer in quantizers])
        grids = tuple(_Grid.of(quantizer) for quantizer in quantizers)
        mixed: Tensor = _Mix.apply(x, self.probabilities(), levels, offsets, center, grids, memory)
        return mixed

    def extra_repr(self) -> str:
        """The candidates' bits."""
        return f"candidates={self.candidates}"


class _Grid(NamedTuple):
    """The grid of one candidate: `Q(x) = level (k - zero)/density + offset`.

    `k = round(clamp((x - offset)/level, low, high) density + zero)`; `low` and `high` are in units of the level.
    The gradient passes between them, and at them if `closed`. `quantize(x, level[, offset])` is the same by itself.
    """

    quantize: Any
    low: float
    high: float
    density: float
    zero: float = 0.0
    closed: bool = False
    has_step: bool = False

    @classmethod
    def of(cls, quantizer: Quantizer) -> "_Grid":
        bits, steps = quantizer.bits, 2**quantizer.bits - 1
        if isinstance(quantizer, ClipWeightQuantizer):
            return cls(partial(clip_weight, bits=bits), -1, 1, steps / 2, zero=steps / 2, closed=True)
        if isinstance(quantizer, ClipActivationQuantizer):
            return cls(partial(clip_activation, bits=bits), 0, 1, steps)
        if isinstance(quantizer, StepQuantizer):
            function = lsq if quantizer.offset is None else lsq_plus
            quantize = partial(function, bits=bits, signed=quantizer.signed)
            return cls(quantize, *integer_range(bits, quantizer.signed), 1, has_step=True)
        raise PrecisionError(f"a mixture cannot take a {type(quantizer).__name__}")

    def gradient_scale(self, numel: int) -> float:
        """That of steps and offsets (LSQ, Sec. 2.2); clipping levels have none."""
        return 1 / math.sqrt(numel * self.high) if self.has_step else 1.0


class _Mix(torch.autograd.Function):
    """`sum_b p_b Q_b(x - center)` with levels per tensor; the gradients are those of the sum.

    With sums over all elements, `inside` those where candidate b passes gradients, and K_b = sum g k_b:

        V_b = sum g (Q_b - offset_b) = level_b (K_b - zero_b sum g)/density_b
        dL/dp_b = V_b + offset_b sum g
        dL/dlevel_b = p_b (V_b - sum_inside g (x - center - offset_b))/level_b
        dL/doffset_b = p_b (sum g - sum_inside g)

    so that one pass over blocks of x and g gives all of them. `x/level` is computed as `x (1/level)`: a value within
    rounding error of the middle of two levels may go to the other one than in the quantizer by itself.
    """

    @staticmethod
    def forward(
        x: Tensor,
        probabilities: Tensor,
        levels: Tensor,
        offsets: Tensor | None,
        center: float,
        grids: tuple[_Grid, ...],
        memory: Tensor | None,
    ) -> Tensor:
        candidates = _candidates(probabilities, levels, offsets, center, grids)
        constant = sum(each.weight * each.offset - each.slope * each.grid.zero for each in candidates)
        mixed = torch.empty_like(x, memory_format=torch.contiguous_format) if memory is None else memory.detach()
        for block, mixed_block, codes, _ in _blocks(x, mixed):
            mixed_block.fill_(constant)
            for candidate in candidates:
                mixed_block.add_(candidate.codes(block, codes), alpha=candidate.slope)
        return mixed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.center, ctx.grids, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, probabilities, levels, offsets = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradients are to be differentiated again.
            tensors = x - ctx.center, probabilities, levels, offsets
            return *_differentiable_gradients(grad, ctx.grids, *tensors), None, None, None
        candidates = _candidates(probabilities, levels, offsets, ctx.center, ctx.grids)
        all_edges = _edges(levels, offsets, ctx.center, ctx.grids)
        grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        needs_count = offsets is not None or ctx.center != 0
        for block, grad_block, grad_x_block, codes, inside in _blocks(x, grad, grad_x):
            grad_x_block.zero_()
            for each, edges in zip(candidates, all_edges, strict=True):
                each.sum_codes += float(grad_block.dot(each.codes(block, codes)))
                # A comparison and a product would take four times as long.
                torch.ops.aten.hardtanh_backward.grad_input(grad_block, block, *edges, grad_input=inside)
                grad_x_block.add_(inside, alpha=each.weight)
                each.sum_inside_x += float(inside.dot(block))
                if needs_count:
                    each.sum_inside += float(inside.sum())
        total = float(grad.sum())
        gradients = zip(*(each.gradients(total, x.numel()) for each in candidates), strict=True)
        of_probabilities, of_levels, of_offsets = (levels.new_tensor(each) for each in gradients)
        return grad_x, of_probabilities, of_levels, None if offsets is None else of_offsets, None, None, None


def _differentiable_gradients(
    grad: Tensor, grids: tuple[_Grid, ...], x: Tensor, probabilities: Tensor, levels: Tensor, offsets: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the sum written out."""
    operands = (levels,) if offsets is None else (levels, offsets)

    def mixed(x: Tensor, probabilities: Tensor, *operands: Tensor) -> Tensor:
        candidates = zip(grids, probabilities, *operands, strict=True)
        return torch.stack([p * grid.quantize(x, *levels) for grid, p, *levels in candidates]).sum(0)

    gradients: tuple[Tensor, ...] = torch.func.vjp(mixed, x, probabilities, *operands)[1](grad)
    return gradients if offsets is not None else (*gradients, None)


@dataclass
class _Candidate:
    """One candidate in numbers, and the sums over blocks that its gradients need.

    `k = round(clamp(rate x + shift, *code_range))`.
    """

    grid: _Grid
    weight: float
    level: float
    offset: float
    origin: float
    shift: Tensor
    sum_codes: float = 0.0
    sum_inside: float = 0.0
    sum_inside_x: float = 0.0

    def __post_init__(self) -> None:
        grid = self.grid
        self.rate = grid.density / self.level
        self.slope = self.weight / self.rate
        self.code_range = (grid.low * grid.density + grid.zero, grid.high * grid.density + grid.zero)

    def codes(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.add(self.shift, x, alpha=self.rate, out=out).clamp_(*self.code_range).round_()

    def gradients(self, total: float, numel: int) -> tuple[float, float, float]:
        """Of the probability, the level and the offset, given the sum of the gradient."""
        value = (self.sum_codes - self.grid.zero * total) / self.rate
        scale = self.weight * self.grid.gradient_scale(numel)
        of_level = scale * (value - self.sum_inside_x + self.origin * self.sum_inside) / self.level
        return value + self.offset * total, of_level, scale * (total - self.sum_inside)


def _candidates(
    probabilities: Tensor, levels: Tensor, offsets: Tensor | None, center: float, grids: tuple[_Grid, ...]
) -> list[_Candidate]:
    level, offset = levels.tolist(), [0.0] * len(grids) if offsets is None else offsets.tolist()
    origins = [center + each for each in offset]
    shifts = [grid.zero - grid.density / s * origin for grid, s, origin in zip(grids, level, origins, strict=True)]
    columns = grids, probabilities.tolist(), level, offset, origins, levels.new_tensor(shifts)
    return [_Candidate(*each) for each in zip(*columns, strict=True)]


def _edges(
    levels: Tensor, offsets: Tensor | None, center: float, grids: tuple[_Grid, ...]
) -> list[tuple[float, float]]:
    """For each candidate, the last number below and the first above those whose gradient passes.

    Data that fits its grid exactly lies at the ends, so `low level + offset` is not enough: it may be some ulps off
    what the quantizer by itself, which subtracts first and divides by the level, decides.
    """
    low, high = levels.new_tensor([(grid.low, grid.high) for grid in grids]).T
    offsets = torch.zeros_like(levels) if offsets is None else offsets
    lower, upper = (_neighbours(levels * end + offsets + center) for end in (low, high))
    at_lower, at_upper = (lower - center - offsets) / levels, (upper - center - offsets) / levels
    closed = grids[0].closed
    below, above = (at_lower < low, at_upper > high) if closed else (at_lower <= low, at_upper >= high)
    lower, upper = lower.where(below, -torch.inf).amax(0), upper.where(above, torch.inf).amin(0)
    return list(zip(lower.tolist(), upper.tolist(), strict=True))


def _neighbours(values: Tensor, reach: int = 4) -> Tensor:
    """Each value among the next floating-point numbers on both sides, in order; along a new first axis."""
    below, above = [values], [values]
    for _ in range(reach):
        below.append(below[-1].nextafter(values.new_tensor(-torch.inf)))
        above.append(above[-1].nextafter(values.new_tensor(torch.inf)))
    return torch.stack([*reversed(below), *above[1:]])


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat blocks of tensors of one shape, and two blocks of working memory that all of them share."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    memory = flat[0].new_empty(2, min(_BLOCK, flat[0].numel()))
    for start in range(0, flat[0].numel(), _BLOCK):
        blocks = [each[start : start + _BLOCK] for each in flat]
        yield *blocks, *memory[:, : len(blocks[0])]
