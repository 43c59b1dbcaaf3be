"""Gradients of leaf tensors: made where there are none, added up, checked."""

import math

import torch
from torch import Tensor, nn

from saq_fx.parallel import local


def gradient_of(tensor: Tensor) -> Tensor:
    """The gradient of a leaf tensor, made of zeros where the loss did not reach it; of a sharded one, the shard."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return local(tensor.grad)


def add_gradients(
    totals: dict[Tensor, Tensor], parameters: list[nn.Parameter], memory: dict[Tensor, Tensor], *, keep: bool
) -> None:
    """Adds the parameters' gradients to totals, which begin as copies in the memory given, or as those, if kept."""
    known = [parameter for parameter in parameters if parameter in totals]
    new = [parameter for parameter in parameters if parameter not in totals]
    if known:
        torch._foreach_add_([totals[parameter] for parameter in known], [gradient_of(parameter) for parameter in known])
    gradients = [gradient_of(parameter) for parameter in new]
    if new and not keep:
        copies = [_like(each, memory.get(parameter)) for parameter, each in zip(new, gradients, strict=True)]
        torch._foreach_copy_(copies, gradients)
        gradients = copies
    totals.update(zip(new, gradients, strict=True))


def _like(tensor: Tensor, held: Tensor | None) -> Tensor:
    """The tensor that is held, if it can be written over; else a new one."""
    if held is None or (held.dtype, held.device) != (tensor.dtype, tensor.device):
        return torch.empty_like(tensor)
    return held


def all_finite(norm: float, loss: Tensor) -> bool:
    """Whether both are finite."""
    return math.isfinite(norm) and math.isfinite(float(loss))
