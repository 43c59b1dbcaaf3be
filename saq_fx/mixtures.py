"""Mixtures over bit-widths: what the search puts in the place of a quantizer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from saq_fx.errors import PrecisionError
from saq_fx.fake_quantization import (
    clip_activation,
    clip_weight,
    deviation,
    guarded,
    integer_range,
    lsq,
    lsq_plus,
    with_signature,
)
from saq_fx.precision import FLOAT_BITS
from saq_fx.quantizers import ClipActivationQuantizer, ClipWeightQuantizer, Quantizer, StepQuantizer

_BLOCK = 2**17
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
            # Without the hooks of activation checkpointing, since what it runs again finds the mixture held.
            with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                self.mixed = mixture.mix(x, memory.detach() if memory is not None and fits else None)
            if memory is None or not fits:
                self.leaf = self.mixed.detach().requires_grad_()
            else:
                memory.data = self.mixed.detach()  # the leaf stays the same one wherever the mixture was written
        assert self.leaf is not None
        return self.leaf

    def release(self) -> None:
        """The next forward mixes anew."""
        self.mixed = None


def _itself(tensor: Tensor) -> Tensor:
    return tensor


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

    def log_probabilities(self) -> Tensor:
        """Their logarithms, finite also where a probability is too small for its type."""
        return (self.logits / self.temperature).log_softmax(0)

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
            and level.numel() == 1
        )

    def _mix_by_blocks(self, x: Tensor, memory: Tensor | None) -> Tensor:
        quantizers: list[Any] = list(self.quantizers)
        for quantizer in quantizers:
            quantizer.initialize_once(x)
        smallest = torch.cat([quantizer.smallest_level for quantizer in quantizers])
        levels = guarded(torch.cat([quantizer.level for quantizer in quantizers]), smallest)
        center = 0.0
        if getattr(quantizers[0], "normalize", False):
            mean = x.detach().mean()
            center, std = float(mean), deviation(torch.sub(x.detach(), mean, out=memory))
            # A constant tensor has next to no deviation; the rates of its grids must be finite all the same.
            levels = (levels * std).clamp_min(math.sqrt(torch.finfo(x.dtype).tiny))
        offset = getattr(quantizers[0], "offset", None)
        offsets = None if offset is None else torch.cat([quantizer.offset for quantizer in quantizers])
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
        return 1 / math.sqrt(max(1, numel) * self.high) if self.has_step else 1.0


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
    @with_signature
    def forward(
        x: Tensor,
        probabilities: Tensor,
        levels: Tensor,
        offsets: Tensor | None,
        center: float,
        grids: tuple[_Grid, ...],
        memory: Tensor | None,
    ) -> Tensor:
        candidates = _Candidates.of(probabilities, levels, offsets, center, grids)
        slopes = levels.new_tensor(candidates.slopes)
        constant = levels.new_tensor(candidates.constant())
        mixed = torch.empty_like(x, memory_format=torch.contiguous_format) if memory is None else memory.detach()
        for codes, block, mixed_block in _blocks(len(grids), x, mixed):
            candidates.write_codes(block, codes)
            torch.addmv(constant.expand(len(block)), codes.T, slopes, out=mixed_block)
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
        candidates = _Candidates.of(probabilities, levels, offsets, ctx.center, ctx.grids)
        edges = _edges(levels, offsets, ctx.center, ctx.grids)
        grad_x = torch.empty_like(grad, memory_format=torch.contiguous_format)
        sums, from_zero = [], offsets is None and not ctx.center
        for work, block, grad_block, grad_x_block in _blocks(len(edges), x, grad, grad_x):
            candidates.write_codes(block, work)
            of_codes = work.mv(grad_block)
            for (low, high), inside in zip(edges, work.unbind(), strict=True):
                # A comparison and a product would take four times as long.
                torch.ops.aten.hardtanh_backward.grad_input(grad_block, block, low, high, grad_input=inside)
            torch.mv(work.T, probabilities, out=grad_x_block)
            passed = torch.zeros_like(of_codes) if from_zero else work.sum(1)
            sums.append(torch.stack([of_codes, passed, work.mv(block)]))
        totals = torch.stack(sums).sum(0, dtype=torch.double).tolist()
        gradients = candidates.gradients(totals, float(grad.sum()), x.numel())
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


@dataclass(frozen=True)
class _Candidates:
    """The candidates in numbers: `k = round(clamp(rate x + shift, *code_range))` of each."""

    grids: tuple[_Grid, ...]
    weights: list[float]
    levels: list[float]
    offsets: list[float]
    origins: list[float]
    rates: list[float]
    shifts: Tensor
    code_ranges: list[tuple[float, float]]

    @classmethod
    def of(
        cls, probabilities: Tensor, levels: Tensor, offsets: Tensor | None, center: float, grids: tuple[_Grid, ...]
    ) -> "_Candidates":
        numbers, offset = levels.tolist(), [0.0] * len(grids) if offsets is None else offsets.tolist()
        rates = [grid.density / level for grid, level in zip(grids, numbers, strict=True)]
        origins = [center + each for each in offset]
        shifts = [grid.zero - rate * origin for grid, rate, origin in zip(grids, rates, origins, strict=True)]
        ranges = [(each.low * each.density + each.zero, each.high * each.density + each.zero) for each in grids]
        return cls(grids, probabilities.tolist(), numbers, offset, origins, rates, levels.new_tensor(shifts), ranges)

    @property
    def slopes(self) -> list[float]:
        """What one step of each candidate's codes adds to the mixture."""
        return [weight / rate for weight, rate in zip(self.weights, self.rates, strict=True)]

    def constant(self) -> float:
        """The mixture where all codes are 0."""
        columns = self.weights, self.offsets, self.slopes, self.grids
        return sum(w * offset - slope * grid.zero for w, offset, slope, grid in zip(*columns, strict=True))

    def write_codes(self, x: Tensor, out: Tensor) -> None:
        """The codes of a flat x, (candidates, elements)."""
        for codes, shift, rate, ends in zip(out.unbind(), self.shifts, self.rates, self.code_ranges, strict=True):
            torch.add(shift, x, alpha=rate, out=codes).clamp_(*ends)
        out.round_()

    def gradients(
        self, sums: list[list[float]], total: float, numel: int
    ) -> tuple[list[float], list[float], list[float]]:
        """Of the probabilities, the levels and the offsets, given what `_Mix.backward` sums, and the gradient's sum."""
        sum_codes, sum_inside, sum_inside_x = sums
        of_probabilities, of_levels, of_offsets = [], [], []
        for b, grid in enumerate(self.grids):
            value = (sum_codes[b] - grid.zero * total) / self.rates[b]
            scale = self.weights[b] * grid.gradient_scale(numel)
            passed = sum_inside_x[b] - self.origins[b] * sum_inside[b]
            of_probabilities.append(value + self.offsets[b] * total)
            of_levels.append(scale * (value - passed) / self.levels[b])
            of_offsets.append(scale * (total - sum_inside[b]))
        return of_probabilities, of_levels, of_offsets


def _edges(
    levels: Tensor, offsets: Tensor | None, center: float, grids: tuple[_Grid, ...]
) -> list[tuple[float, float]]:
    """For each candidate, the last number below and the first above those whose gradient passes.

    Data that fits its grid exactly lies at the ends, so `low level + offset` is not enough: it may be some ulps off
    what the quantizer by itself, which subtracts first and divides by the level, decides.
    """
    # By numpy, whose calls on a handful of numbers take a third of torch's.
    ends = np.array([(grid.low, grid.high) for grid in grids], levels.detach().numpy().dtype).T
    scale, shift = levels.detach().numpy(), np.zeros_like(ends[0]) if offsets is None else offsets.detach().numpy()
    near = [(ends * scale + shift + ends.dtype.type(center))]
    for _ in range(4):
        near = [
            np.nextafter(near[0], -np.inf, dtype=ends.dtype),
            *near,
            np.nextafter(near[-1], np.inf, dtype=ends.dtype),
        ]
    edges = np.stack(near)
    at = (edges - ends.dtype.type(center) - shift) / scale
    closed = grids[0].closed
    under, over = (at < ends, at > ends) if closed else (at <= ends, at >= ends)
    lower = np.where(under, edges, -np.inf)[:, 0].max(0)
    upper = np.where(over, edges, np.inf)[:, 1].min(0)
    return list(zip(lower.tolist(), upper.tolist(), strict=True))


def _blocks(candidates: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Working memory, (candidates, elements), which all blocks share, and flat blocks of tensors of one shape."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    work = flat[0].new_empty(candidates, min(_BLOCK, flat[0].numel()))
    for blocks in zip(*(torch.split(each, _BLOCK) for each in flat), strict=True):
        yield work[:, : len(blocks[0])], *blocks
