"""The modules that hold the levels of fake quantization, and how levels are first fitted."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saq_fx.errors import CalibrationError, PrecisionError
from saq_fx.fake_quantization import (
    ClipActivation,
    ClipWeight,
    Step,
    clip_activation,
    clip_weight,
    integer_range,
    lsq,
    lsq_plus,
)
from saq_fx.precision import FLOAT_BITS, MAX_BITS, MIN_BITS

_SMALLEST_SHARE = 0.1
"""Levels are used at no less than this share of what they were fitted to: a collapsed level never recovers."""

_INITIALISATION_SAMPLES = 2**14
_CANDIDATES = 16
_COARSE = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES)[:, None, None]
_FINE = torch.linspace(-0.75, 0.75, 7)[:, None, None] / _CANDIDATES
"""Levels that are tried, as shares of the largest magnitude: first these, then around the best of them."""


class Quantizer(nn.Module):
    """A tensor's quantizer: bits, levels, and whether the levels have been set.

    Levels that have not been set are fitted to the first finite tensor that comes. The state dict holds the levels,
    and bits and flag as a small tensor; loading a state dict without any of them (a float checkpoint) leaves the bits
    and has the levels fitted anew.

    Args:
        bits: 2 to 8, or 32 for the identity.

    Raises:
        PrecisionError: other bits.
    """

    signed: bool
    smallest_level: Tensor

    def __init__(self, bits: int, level: Tensor) -> None:
        super().__init__()
        self.bits = _checked_bits(bits)
        self.initialized = False
        self.register_buffer("smallest_level", torch.zeros_like(level))

    @property
    def level(self) -> nn.Parameter:
        """The parameter that scales the grid: a clipping level or a step."""
        raise NotImplementedError

    def guarded_level(self) -> Tensor:
        """The level, at least the smallest; the gradient passes all the same, so that it can grow again."""
        return guarded(self.level, self.smallest_level)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor, of the shape and type of `x`."""
        if self.bits == FLOAT_BITS:
            return x
        # Detached, or a checkpoint would save more in the first run than in the second.
        if not self.initialized and bool(torch.isfinite(x.detach()).all()):
            self.initialize(x.detach())
        return self.quantize(x)

    def quantize(self, x: Tensor) -> Tensor:
        """Quantizes by the current levels."""
        raise NotImplementedError

    def codes(self, x: Tensor) -> Tensor:
        """The integers that stand for the quantized values, of the shape of `x`."""
        raise NotImplementedError

    def fit(self, x: Tensor, method: str) -> None:
        """Sets the levels from data that is finite and not all zero."""
        raise NotImplementedError

    def initialize(self, x: Tensor, method: str = "mse") -> None:
        """Sets the levels from data: minimum mean squared error ("mse"), "max", or "percentile" (99.9).

        Raises:
            CalibrationError: the data is not finite.
        """
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError("cannot set clipping levels from values that are not finite: look at the input")
        with torch.no_grad():
            if x.numel() and bool(x.any()) and self.bits != FLOAT_BITS:
                self.fit(x.detach(), method)
            else:
                self.level.fill_(1)
            self.smallest_level.copy_(_SMALLEST_SHARE * self.level)
        self.initialized = self.bits != FLOAT_BITS and x.numel() > 0

    def set_bits(self, bits: int) -> None:
        """Changes the bits; new ones have the levels fitted anew at the next forward."""
        if _checked_bits(bits) != self.bits:
            self.bits = bits
            self.initialized = False

    def get_extra_state(self) -> Tensor:
        """Bits and whether the levels are set, as a tensor that every file format takes."""
        return torch.tensor([self.bits, int(self.initialized)])

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse of `get_extra_state`."""
        bits, initialized = state.tolist()
        self.bits, self.initialized = _checked_bits(bits), bool(initialized)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            self.initialized = False

    def extra_repr(self) -> str:
        """Bits and sign."""
        return f"bits={self.bits}, signed={self.signed}"


class ClipWeightQuantizer(Quantizer):
    """`clip` for weights: one clipping level, or one per output channel.

    Args:
        channels, channel_axis: number and axis of output channels; None for one level per tensor.
        normalize: quantize `(w - mean)/std` and multiply back by std (APoT, used by SAQ, Sec. 5).
    """

    signed = True

    def __init__(
        self,
        bits: int,
        *,
        channels: int | None = None,
        channel_axis: int = 0,
        normalize: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        level = _ones(channels, device, dtype)
        super().__init__(bits, level)
        self.channel_axis, self.normalize = channel_axis, normalize
        self.clipping_level = nn.Parameter(level)

    @property
    def level(self) -> nn.Parameter:
        """The clipping level."""
        return self.clipping_level

    def quantize(self, x: Tensor) -> Tensor:
        """SAQ Eq. 1-2."""
        level = _per_channel(self.guarded_level(), x, self.channel_axis)
        if not self.normalize:
            return clip_weight(x, level, self.bits)
        x, std = centered(x)
        return clip_weight(x, level * std, self.bits)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """0 to 2**bits - 1."""
        level = _per_channel(self.guarded_level(), x, self.channel_axis)
        if self.normalize:
            level = level * centered(x)[1]
        codes: Tensor = (self.quantize(x) / level + 1) * ((2**self.bits - 1) / 2)
        return codes.round().int()

    def fit(self, x: Tensor, method: str) -> None:
        """One level for the tensor or for each channel."""
        if self.normalize:
            x, std = centered(x)
            x = x / std
        rows = _rows(x, self.clipping_level, self.channel_axis)
        levels = _fit_level(rows.abs(), method, lambda level: ClipWeight.forward(rows, level, self.bits), rows)
        self.clipping_level.copy_(levels.reshape(self.clipping_level.shape))


class ClipActivationQuantizer(Quantizer):
    """`clip` for activations that cannot be negative: one clipping level."""

    signed = False

    def __init__(self, bits: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        level = _ones(None, device, dtype)
        super().__init__(bits, level)
        self.clipping_level = nn.Parameter(level)

    @property
    def level(self) -> nn.Parameter:
        """The clipping level."""
        return self.clipping_level

    def quantize(self, x: Tensor) -> Tensor:
        """SAQ Eq. 1-2."""
        return clip_activation(x, self.guarded_level(), self.bits)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """0 to 2**bits - 1."""
        codes: Tensor = self.quantize(x) / self.guarded_level() * (2**self.bits - 1)
        return codes.round().int()

    def fit(self, x: Tensor, method: str) -> None:
        """One level for the tensor."""
        rows = _rows(x, self.clipping_level, 0)
        levels = _fit_level(
            rows.clamp_min(0), method, lambda level: ClipActivation.forward(rows, level, self.bits), rows
        )
        self.clipping_level.copy_(levels.reshape(self.clipping_level.shape))


class StepQuantizer(Quantizer):
    """LSQ, or LSQ+ with an offset: one step, or one per output channel."""

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        offset: bool = False,
        channels: int | None = None,
        channel_axis: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        level = _ones(channels, device, dtype)
        super().__init__(bits, level)
        self.signed, self.channel_axis = signed, channel_axis
        self.step = nn.Parameter(level)
        self.offset = nn.Parameter(torch.zeros_like(self.step)) if offset else None

    @property
    def level(self) -> nn.Parameter:
        """The step."""
        return self.step

    def quantize(self, x: Tensor) -> Tensor:
        """LSQ Eq. 1-3, LSQ+ Eq. 1-2."""
        step = _per_channel(self.guarded_level(), x, self.channel_axis)
        if self.offset is None:
            return lsq(x, step, self.bits, self.signed)
        offset = _per_channel(self.offset, x, self.channel_axis)
        return lsq_plus(x, step, offset, self.bits, self.signed)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Within `integer_range`."""
        quantized = self.quantize(x)
        if self.offset is not None:
            quantized = quantized - _per_channel(self.offset, x, self.channel_axis)
        return (quantized / _per_channel(self.guarded_level(), x, self.channel_axis)).round().int()

    def fit(self, x: Tensor, method: str) -> None:
        """One step (and offset) for the tensor or for each channel."""
        rows = _rows(x, self.step, self.channel_axis)
        low, high = integer_range(self.bits, self.signed)
        if self.offset is None:
            magnitude = rows.abs() if self.signed else rows.clamp_min(0)
            levels = _fit_level(
                magnitude, method, lambda level: Step.forward(rows, level / high, None, low, high), rows
            )
            self.step.copy_((levels / high).reshape(self.step.shape))
            return
        center = (rows.amax(1, keepdim=True) + rows.amin(1, keepdim=True)) / 2
        reach = (rows - center).abs()
        offset_of_center = (low + high) / 2

        def reconstruct(level: Tensor) -> Tensor:
            step = 2 * level / (high - low)
            return Step.forward(rows, step, center - offset_of_center * step, low, high)

        step = 2 * _fit_level(reach, method, reconstruct, rows) / (high - low)
        self.step.copy_(step.reshape(self.step.shape))
        self.offset.copy_((center - offset_of_center * step).reshape(self.offset.shape))


def _checked_bits(bits: int) -> int:
    if bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise PrecisionError(f"{bits} bits: a quantizer takes {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float")
    return bits


def _ones(channels: int | None, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    # One level has an axis too: sharding (FSDP2) refuses parameters without.
    return torch.ones(channels or 1, device=device, dtype=dtype)


def guarded(level: Tensor, smallest: Tensor) -> Tensor:
    """The level, at least the smallest; the gradient passes all the same."""
    passing = level - level.detach()  # zero, with the level's gradient
    return level.where(level >= smallest, smallest + passing)


def centered(x: Tensor) -> tuple[Tensor, Tensor]:
    """x less its mean, and its standard deviation (never 0), both constants to the gradient.

    On CPUs ten times as fast as `torch.std_mean`.
    """
    x = x - x.detach().mean()
    return x, deviation(x.detach())


def deviation(centered: Tensor) -> Tensor:
    """The standard deviation of a tensor whose mean is 0; never 0 itself."""
    std: Tensor = torch.linalg.vector_norm(centered) / math.sqrt(max(1, centered.numel() - 1))
    return std.clamp_min(torch.finfo(centered.dtype).tiny)


def _per_channel(level: Tensor, x: Tensor, axis: int) -> Tensor:
    if level.numel() == 1:
        return level
    return level.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])


def _rows(x: Tensor, level: Tensor, axis: int) -> Tensor:
    """(levels, elements that share one), evenly thinned out where they are many, in single precision at least."""
    rows = x.reshape(1, -1) if level.numel() == 1 else x.movedim(axis, 0).flatten(1)
    stride = max(1, x.numel() // _INITIALISATION_SAMPLES)
    return rows[:, ::stride].to(torch.promote_types(level.dtype, torch.float32))


def _fit_level(magnitude: Tensor, method: str, reconstruct: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """(levels, 1): the clipping level of each row of magnitudes; rows of zeros get 1.

    `reconstruct` quantizes `rows` by levels (candidates, levels, 1), all candidates at once.
    """
    largest = magnitude.amax(1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    if method == "max":
        return largest
    if method == "percentile":
        level = magnitude.quantile(0.999, dim=1, keepdim=True)
        return torch.where(level > 0, level, largest)
    best = torch.zeros_like(largest)
    for fractions in (_COARSE, _FINE):
        candidates = best + largest * fractions.to(largest)
        errors = (reconstruct(candidates) - rows).square_().mean(2, keepdim=True)
        best = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
    return best
