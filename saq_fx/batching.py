"""Cutting a batch, whatever tensors it is made of, along its first axis."""

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from saq_fx.errors import TrainingError


def batch_size(batch: Any) -> int:
    """Samples of a batch: the common length of all its tensors.

    Args:
        batch: tensors in any nesting of tuples, lists and dicts.

    Raises:
        TrainingError: it holds no tensor, or tensors of different lengths.
    """
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise TrainingError(
            f"a batch can be cut where all of its tensors have the samples along their first axis; it has {shapes}"
        )
    return int(shapes[0][0])


def chunks(batch: Any, size: int) -> Iterator[Any]:
    """Consecutive parts of a batch, of `size` samples each; the last may be smaller."""
    total = batch_size(batch)
    return (_part(batch, start, start + size) for start in range(0, total, size))


def first_part(batch: Any, fraction: float) -> Any:
    """The first `fraction` of a batch's samples, rounded up."""
    return _part(batch, 0, math.ceil(fraction * batch_size(batch)))


def _part(batch: Any, start: int, end: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[start:end] if isinstance(leaf, Tensor) else leaf, batch)
