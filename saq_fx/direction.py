"""The direction that sharpness-aware steps reuse between second passes."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Direction:
    """g_v: the part of the last computed g_s that is orthogonal to its g, per parameter (SAQ, Algorithm 1).

    `norm` is its global norm, over all data-parallel workers that hold shards of it; 0 while there is no direction.
    """

    def __init__(self) -> None:
        self.values: dict[Tensor, Tensor] = {}
        self.norm = 0.0

    def keep(self, values: dict[Tensor, Tensor], norm: float) -> None:
        """Takes a new direction: parameter -> tensor of its shape; one of norm 0 is none."""
        self.values, self.norm = (values, norm) if norm else ({}, 0.0)

    def forget(self) -> dict[Tensor, Tensor]:
        """Drops the direction; what it was is memory to be used again."""
        memory = self.values
        self.keep({}, 0.0)
        return memory

    @torch.no_grad()
    def add_to(self, gradients: Mapping[Tensor, Tensor], length: float) -> None:
        """Adds `length * g_v/||g_v||` to the gradients of parameters, of those that it has."""
        reused = [parameter for parameter in gradients if parameter in self.values]
        if reused:
            targets = [gradients[parameter] for parameter in reused]
            # The module may have been moved to another type or device since.
            values = [self.values[each].to(target) for each, target in zip(reused, targets, strict=True)]
            torch._foreach_add_(targets, values, alpha=length / self.norm)
