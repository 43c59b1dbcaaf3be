"""Fake quantization with straight-through gradients.

Two schemes. `clip` (SAQ, arXiv 2111.12273, Eq. 1-2): one trainable clipping level; weights have 2**b symmetric
levels, none of them zero, activations are unsigned. `lsq` and `lsq+` (LSQ, ICLR 2020; LSQ+, CVPRW 2020): a trainable
step, and offset, over integer levels with zero among them.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer of a width."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


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


def with_signature(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keeps the signature that torch otherwise takes apart at every call, for longer than small tensors take."""
    vars(forward)["__signature__"] = inspect.signature(forward)
    return forward


class ClipWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(weight: Tensor, level: Tensor, bits: int) -> Tensor:
        steps = 2**bits - 1
        normalized = (weight / level).clamp_(-1, 1).add_(1).mul_(steps / 2).round_()
        return normalized.mul_(2 / steps).sub_(1).mul_(level)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, level, _ = inputs
        ctx.save_for_backward(weight, level, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, level, output = (each.detach() for each in ctx.saved_tensors)
        # The first number above 1, so that the gradient passes at the clipped ends too.
        end = 1 + torch.finfo(weight.dtype).eps
        passed = _pass_between(grad, weight / level, -end, end)
        return passed, _level_gradient(grad, output, passed, weight, level), None


class ClipActivation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(x: Tensor, level: Tensor, bits: int) -> Tensor:
        steps = 2**bits - 1
        return (x / level).clamp_(0, 1).mul_(steps).round_().div_(steps).mul_(level)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, level, _ = inputs
        ctx.save_for_backward(x, level, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, level, output = (each.detach() for each in ctx.saved_tensors)
        passed = _pass_between(grad, x / level, 0, 1)
        return passed, _level_gradient(grad, output, passed, x, level), None


class Step(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    @with_signature
    def forward(x: Tensor, step: Tensor, offset: Tensor | None, low: int, high: int) -> Tensor:
        shifted = x if offset is None else x - offset
        quantized = (shifted / step).round_().clamp_(low, high).mul_(step)
        return quantized if offset is None else quantized.add_(offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, step, offset, ctx.low, ctx.high = inputs
        ctx.has_offset = offset is not None
        ctx.save_for_backward(x, output, step, *([offset] if ctx.has_offset else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, output, step, *rest = (each.detach() for each in ctx.saved_tensors)
        if rest:
            x, output = x - rest[0], output - rest[0]
        scale = 1 / math.sqrt(max(1, x.numel()) / step.numel() * ctx.high)
        passed = _pass_between(grad, x / step, ctx.low, ctx.high)
        grad_step = _level_gradient(grad, output, passed, x, step) * scale
        grad_offset = (grad - passed).sum_to_size(rest[0].shape) * scale if rest else None
        return passed, grad_step, grad_offset, None, None


def _pass_between(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """`grad` where low < x < high, else 0; several times as fast as a comparison and a product."""
    passed: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)
    return passed


def _level_gradient(grad: Tensor, output: Tensor, passed: Tensor, x: Tensor, level: Tensor) -> Tensor:
    """`sum g (Q/level - x/level)` where the gradient passes, `sum g Q/level` elsewhere."""
    if level.numel() == 1:  # sums of products that need no memory for the products
        total = torch.dot(grad.flatten(), output.flatten()) - torch.dot(passed.flatten(), x.flatten())
        return total.reshape(level.shape) / level
    return (grad * output).sub(passed * x).sum_to_size(level.shape) / level


def clip_weight(weight: Tensor, clipping_level: Tensor, bits: int) -> Tensor:
    """`alpha (2 round((clamp(w/alpha, -1, 1) + 1)/2 n)/n - 1)`, `n = 2**bits - 1` (SAQ Eq. 1-2, 10).

    Gradients: to w, 1 where |w| <= alpha; to alpha, `Q/alpha - w/alpha` there and sign(w) outside.

    Args:
        weight: any shape.
        clipping_level: alpha > 0, broadcastable to `weight`.
    """
    return _apply(ClipWeight, weight, clipping_level, bits)


def clip_activation(x: Tensor, clipping_level: Tensor, bits: int) -> Tensor:
    """`alpha round(clamp(x/alpha, 0, 1) n)/n`, `n = 2**bits - 1` (SAQ Eq. 1-2).

    Gradients: to x, 1 where 0 < x < alpha; to alpha, `Q/alpha - x/alpha` there, 1 from alpha on, 0 up to 0.

    Args:
        x: any shape.
        clipping_level: alpha > 0, broadcastable to `x`.
    """
    return _apply(ClipActivation, x, clipping_level, bits)


def lsq(x: Tensor, step: Tensor, bits: int, signed: bool) -> Tensor:
    """`s clamp(round(x/s), low, high)` (LSQ Eq. 1-3).

    Gradients: to x, 1 where low < x/s < high; to s, `round(x/s) - x/s` there and low or high outside, scaled by
    `1/sqrt(elements per step * high)`.

    Args:
        x: any shape.
        step: s > 0, broadcastable to `x`.
    """
    return _apply(Step, x, step, None, *integer_range(bits, signed))


def lsq_plus(x: Tensor, step: Tensor, offset: Tensor, bits: int, signed: bool) -> Tensor:
    """`s clamp(round((x - o)/s), low, high) + o` (LSQ+ Eq. 1-2).

    Gradients as in `lsq` with x - o for x; to o, 0 inside and 1 outside, with the same scale as the step's.

    Args:
        x: any shape.
        step, offset: broadcastable to `x`.
    """
    return _apply(Step, x, step, offset, *integer_range(bits, signed))


def _apply(function: Any, x: Tensor, *args: Any) -> Tensor:
    """Levels in the type of the tensor (which mixed precision may have lowered)."""
    converted = [each.to(x.dtype) if isinstance(each, Tensor) else each for each in args]
    result: Tensor = function.apply(x, *converted)
    return result
