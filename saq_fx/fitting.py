"""How clipping levels are first fitted to data."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_SAMPLES = 2**14
_CANDIDATES = 16
_COARSE = torch.linspace(1 / _CANDIDATES, 1, _CANDIDATES)[:, None, None]
_FINE = torch.linspace(-0.75, 0.75, 7)[:, None, None] / _CANDIDATES
"""Levels that are tried, as shares of the largest magnitude: first these, then around the best of them."""

_Owner = TypeVar("_Owner")


class Observer:
    """Keeps an evenly spaced sample of every tensor that it is shown or, of a weight, the last one itself."""

    def __init__(self, is_weight: bool) -> None:
        self.samples: list[Tensor] = []
        self._is_weight = is_weight

    def __call__(self, value: Tensor) -> Tensor:
        """Takes note of a tensor, and lets it through as a quantizer would."""
        if self._is_weight:
            self.samples = [value.detach()]
        else:
            flat = value.detach().flatten()
            # A copy: what follows may write to the tensor in place, and a view would keep all of it.
            self.samples.append(flat[:: max(1, flat.numel() // _SAMPLES)].clone())
        return value

    def seen(self) -> Tensor:
        """All samples."""
        return self.samples[0] if len(self.samples) == 1 else torch.cat(self.samples)


Observed = dict[str, dict[int, Observer]]
"""Name of a layer -> position of an operand -> what it was when the layer ran."""


def largest_magnitudes(tensors: Sequence[Tensor]) -> list[float]:
    """Of each tensor the largest magnitude: 0 where it is empty, not finite where it holds what is not."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        alike[tensor.shape, tensor.dtype, tensor.device].append(index)
    found = [0.0] * len(tensors)
    for indices in alike.values():
        for batch in in_batches((index, tensors[index]) for index in indices):
            _, first = batch[0]
            if first.numel():
                together = torch.stack([tensor for _, tensor in batch]).flatten(1) if len(batch) > 1 else None
                low, high = first.aminmax() if together is None else together.aminmax(dim=1)
                for (index, _), value in zip(batch, torch.maximum(-low, high).flatten().tolist(), strict=True):
                    found[index] = value
    return found


def rows_of(x: Tensor, level: Tensor, axis: int) -> Tensor:
    """(levels, elements that share one), evenly thinned out where they are many, in single precision at least."""
    rows = x.reshape(1, -1) if level.numel() == 1 else x.movedim(axis, 0).flatten(1)
    stride = x.numel() // _SAMPLES
    rows = rows[:, ::stride] if stride > 1 else rows
    return rows.to(torch.promote_types(level.dtype, torch.float32))


def in_batches(rows: Iterable[tuple[_Owner, Tensor]]) -> Iterator[list[tuple[_Owner, Tensor]]]:
    """As many rows at a time as have, together, no more elements than one large tensor's."""
    batch: list[tuple[_Owner, Tensor]] = []
    size = 0
    for owner, each in rows:
        if batch and size + each.numel() > _SAMPLES:
            yield batch
            batch, size = [], 0
        batch.append((owner, each))
        size += each.numel()
    yield batch


def fit_level(magnitude: Tensor, method: str, reconstruct: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
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
        errors = reconstruct(candidates).sub_(rows).square_().mean(2, keepdim=True)
        best = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
    return best
