"""MACs of operations that have no entry in the operator table, counted while they run."""

import math
from collections.abc import Callable
from contextlib import suppress
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


def _fused_attention(query: Tensor, key: Tensor, *weights: Tensor) -> int:
    """All projections of every token, and both products; torch's own modules run so in evaluation."""
    tokens = math.prod(query.shape[:-1])
    return tokens * sum(weight.numel() for weight in weights) + 2 * tokens * key.shape[-2] * key.shape[-1]


# What torch's own counter leaves out.
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.mv: lambda matrix, *rest, **options: matrix.numel(),
    _aten.addmv: lambda x, matrix, *rest, **options: matrix.numel(),
    _aten.dot: lambda x, *rest, **options: x.numel(),
    _aten.vdot: lambda x, *rest, **options: x.numel(),
    _aten.addbmm: lambda x, batch1, batch2, *rest, **options: batch1.numel() * batch2.shape[-1],
    _aten.conv_tbc: lambda x, weight, *rest, **options: x.numel() * weight.shape[0] * weight.shape[2],
    _aten.mkldnn_rnn_layer: lambda x, *rest, **options: _recurrent(x, tensors_in(rest[:2])),
    _aten._cudnn_rnn: lambda x, weights, *rest, **options: _recurrent(x, weights),
    _aten._native_multi_head_attention: lambda query, key, *rest, **options: _fused_attention(
        query, key, rest[3], rest[5]
    ),
    _aten._transformer_encoder_layer_fwd: lambda x, *rest, **options: _fused_attention(
        x, x, rest[2], rest[4], rest[13], rest[15]
    ),
    _aten.addmm_: lambda x, left, right, *rest, **options: left.numel() * right.shape[-1],
    _aten.baddbmm_: lambda x, left, right, *rest, **options: left.numel() * right.shape[-1],
    _aten.addbmm_: lambda x, left, right, *rest, **options: left.numel() * right.shape[-1],
    _aten.addmv_: lambda x, matrix, *rest, **options: matrix.numel(),
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
        packet = func._overloadpacket
        with suppress(Exception):  # a formula that does not take these arguments is no reason not to run
            if packet in _FORMULAS:
                self.macs += _FORMULAS[packet](*args, **(kwargs or {}))
            elif func.name() == "torchvision::deform_conv2d":
                self.macs += output.numel() * math.prod(args[1].shape[1:])
            elif packet in flop_registry:
                self.macs += flop_registry[packet](*args, **(kwargs or {}), out_val=output) // 2
        return output
