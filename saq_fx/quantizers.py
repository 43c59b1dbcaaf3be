"""The modules that hold the levels of fake quantization."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saq_fx.errors import CalibrationError, PrecisionError
from saq_fx.fake_quantization import (
    ClipActivation,
    ClipWeight,
    Step,
    centered,
    clip_activation,
    clip_weight,
    guarded,
    integer_range,
    lsq,
    lsq_plus,
)
from saq_fx.fitting import fit_level, in_batches, largest_magnitudes, rows_of
from saq_fx.precision import FLOAT_BITS, MAX_BITS, MIN_BITS

_SMALLEST_SHARE = 0.1
"""Levels are used at no less than this share of what they were fitted to: a collapsed level never recovers."""

NOT_FINITE = "cannot set clipping levels from values that are not finite: look at the input"


class Quantizer(nn.Module):
    """A tensor's quantizer: bits, levels, and whether the levels have been set.

    Levels that have not been set are fitted to the first finite tensor that comes. The state dict holds the levels,
    and bits and flag as a small tensor; loading a state dict without any of them (a float checkpoint) leaves the bits
    and has the levels fitted anew.

    Args:
        bits: 2 to 8, or 32 for the identity.
        constants: attributes of the subclass that are numbers or flags.

    Raises:
        PrecisionError: other bits.
    """

    bits: int
    signed: bool
    initialized = False
    smallest_level: Tensor

    def __init__(self, bits: int, level: Tensor, **constants: Any) -> None:
        super().__init__()
        # Not one by one: a module looks through all its tables for each attribute that is set.
        vars(self).update(bits=_checked_bits(bits), **constants)
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
        self.initialize_once(x)
        return self.quantize(x)

    def initialize_once(self, x: Tensor) -> None:
        """Fits levels that have not been set; not to values that are not finite."""
        # Detached, or a checkpoint would save more in the first run than in the second.
        if not self.initialized and bool(torch.isfinite(x.detach()).all()):
            self.initialize(x.detach())

    def quantize(self, x: Tensor) -> Tensor:
        """Quantizes by the current levels."""
        raise NotImplementedError

    def codes(self, x: Tensor) -> Tensor:
        """The integers that stand for the quantized values, of the shape of `x`."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """(levels, elements that share one): what levels are fitted to, evenly thinned out where it is much."""
        return rows_of(x, self.level, 0)

    def fitted(self, rows: Tensor, method: str) -> tuple[Tensor, ...]:
        """For each of `level_parameters` its value for each row; of rows of any quantizer of the same `grid`."""
        raise NotImplementedError

    @property
    def level_parameters(self) -> tuple[nn.Parameter, ...]:
        """All that is fitted: the level, and an offset where there is one."""
        return (self.level,)

    @property
    def grid(self) -> tuple[Any, ...]:
        """What fitting depends on other than the data."""
        return type(self), self.bits

    def initialize(self, x: Tensor, method: str = "mse") -> None:
        """Sets the levels from data: minimum mean squared error ("mse"), "max", or "percentile" (99.9).

        Raises:
            CalibrationError: the data is not finite.
        """
        if initialize_all([(self, x)], method):
            raise CalibrationError(NOT_FINITE)

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
    channel_axis: int
    normalize: bool

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
        super().__init__(bits, level, channel_axis=channel_axis, normalize=normalize)
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

    def rows(self, x: Tensor) -> Tensor:
        """Of normalized weights, if it normalizes."""
        if not self.normalize:
            return rows_of(x, self.clipping_level, self.channel_axis)
        x, std = centered(x)
        return rows_of(x, self.clipping_level, self.channel_axis) / std

    def fitted(self, rows: Tensor, method: str) -> tuple[Tensor, ...]:
        """Clipping levels."""
        return (fit_level(rows.abs(), method, lambda level: ClipWeight.forward(rows, level, self.bits), rows),)


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

    def fitted(self, rows: Tensor, method: str) -> tuple[Tensor, ...]:
        """Clipping levels."""
        positive = rows.clamp_min(0)
        return (fit_level(positive, method, lambda level: ClipActivation.forward(rows, level, self.bits), rows),)


class StepQuantizer(Quantizer):
    """LSQ, or LSQ+ with an offset: one step, or one per output channel."""

    channel_axis: int

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
        super().__init__(bits, level, signed=signed, channel_axis=channel_axis)
        self.step = nn.Parameter(level)
        self.offset = nn.Parameter(torch.zeros_like(level)) if offset else None

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

    @property
    def level_parameters(self) -> tuple[nn.Parameter, ...]:
        """The step and the offset."""
        return (self.step,) if self.offset is None else (self.step, self.offset)

    @property
    def grid(self) -> tuple[Any, ...]:
        """Sign and offset as well."""
        return (*super().grid, self.signed, self.offset is None)

    def rows(self, x: Tensor) -> Tensor:
        """One for each step."""
        return rows_of(x, self.step, self.channel_axis)

    def fitted(self, rows: Tensor, method: str) -> tuple[Tensor, ...]:
        """Steps, and offsets."""
        low, high = integer_range(self.bits, self.signed)
        if self.offset is None:
            magnitude = rows.abs() if self.signed else rows.clamp_min(0)
            levels = fit_level(magnitude, method, lambda level: Step.forward(rows, level / high, None, low, high), rows)
            return (levels / high,)
        center = (rows.amax(1, keepdim=True) + rows.amin(1, keepdim=True)) / 2
        reach = (rows - center).abs()
        offset_of_center = (low + high) / 2

        def reconstruct(level: Tensor) -> Tensor:
            step = 2 * level / (high - low)
            return Step.forward(rows, step, center - offset_of_center * step, low, high)

        step = 2 * fit_level(reach, method, reconstruct, rows) / (high - low)
        return step, center - offset_of_center * step


@torch.no_grad()
def initialize_all(data: Iterable[tuple[Quantizer, Tensor]], method: str = "mse") -> list[Quantizer]:
    """Sets the levels of quantizers from their data, as `initialize` does, small tensors many at a time.

    Returns those that keep their levels since their data is not finite.
    """
    pairs = [(quantizer, x.detach()) for quantizer, x in data]
    rejected: list[Quantizer] = []
    blank: dict[Any, list[Quantizer]] = defaultdict(list)
    alike: dict[Any, list[tuple[Quantizer, Tensor]]] = defaultdict(list)
    for (quantizer, x), largest in zip(pairs, largest_magnitudes([x for _, x in pairs]), strict=True):
        if not math.isfinite(largest):
            rejected.append(quantizer)
        elif largest == 0 or quantizer.bits == FLOAT_BITS:
            blank[x.numel() > 0, quantizer.level.dtype, quantizer.level.device].append(quantizer)
        else:
            rows = quantizer.rows(x)
            alike[quantizer.grid, rows.shape[1], quantizer.level.dtype, rows.device].append((quantizer, rows))
    for (has_values, *_), quantizers in blank.items():
        _set_levels(quantizers, [torch.cat([torch.ones_like(each.level) for each in quantizers])])
        for quantizer in quantizers:
            quantizer.initialized &= has_values  # what is empty tells nothing
    for group in alike.values():
        for batch in in_batches(group):
            rows = torch.cat([rows for _, rows in batch])
            _set_levels([quantizer for quantizer, _ in batch], batch[0][0].fitted(rows, method))
    return rejected


def _set_levels(quantizers: list[Quantizer], values: Sequence[Tensor]) -> None:
    """Gives quantizers of one grid the values of their `level_parameters`, one row a level, and notes that."""
    parameters = [quantizer.level_parameters for quantizer in quantizers]
    first = parameters[0][0]
    counts = [each.numel() for each, *_ in parameters]
    # Dividing by less than normal numbers overflows.
    levels = values[0].to(first.dtype).clamp_min(16 * torch.finfo(first.dtype).tiny)
    targets = [quantizer.smallest_level for quantizer in quantizers]
    sources = [*torch.split((levels * _SMALLEST_SHARE).flatten(), counts)]
    for index, each in enumerate((levels, *values[1:])):
        targets += [of_one[index] for of_one in parameters]
        sources += torch.split(each.flatten(), counts)
    torch._foreach_copy_(targets, sources)
    for quantizer in quantizers:
        vars(quantizer)["initialized"] = quantizer.bits != FLOAT_BITS


def _checked_bits(bits: int) -> int:
    if bits != FLOAT_BITS and not MIN_BITS <= bits <= MAX_BITS:
        raise PrecisionError(f"{bits} bits: a quantizer takes {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float")
    return bits


def _ones(channels: int | None, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    # One level has an axis too: sharding (FSDP2) refuses parameters without.
    return torch.ones(channels or 1, device=device, dtype=dtype)


def _per_channel(level: Tensor, x: Tensor, axis: int) -> Tensor:
    if level.numel() == 1:
        return level
    return level.reshape([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])
