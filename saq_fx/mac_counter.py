"""MACs of operations that have no entry in the operator table, counted while they run."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from saq_fx.nested import tensors_in

_aten = torch.ops.aten


def _recurrent(x: Tensor, weights: list[Tensor]) -> int:
    """Every step of every sequence meets every weight once."""
    return math.prod(x.shape[:-1]) * sum(weight.numel() for weight in weights if weight.dim() == 2)


# What torch's own counter leaves out.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda matrix, vector: matrix.numel(),
    _aten.addmv: lambda x, matrix, vector, **options: matrix.numel(),
    _aten.dot: lambda x, other: x.numel(),
    _aten.vdot: lambda x, other: x.numel(),
    _aten.addbmm: lambda x, batch1, batch2, **options: batch1.numel() * batch2.shape[-1],
    _aten.conv_tbc: lambda x, weight, bias, pad: x.numel() * weight.shape[0] * weight.shape[2],
    _aten.mkldnn_rnn_layer: lambda x, *weights_and_state: _recurrent(x, tensors_in(weights_and_state[:2])),
    _aten._cudnn_rnn: lambda x, weights, *state: _recurrent(x, weights),
}


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, adds up the MACs of what runs, as far as a formula is known."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation."""
        output = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.macs += formula(*args, **(kwargs or {}))
        elif func._overloadpacket in flop_registry:
            self.macs += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=output) // 2
        return output
