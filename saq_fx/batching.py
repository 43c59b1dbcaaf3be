"""Cutting a batch, whatever tensors it is made of, along its first axis."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from saq_fx.errors import TrainingError


class Chunk(NamedTuple):
    """A part of a batch: its loss in the first pass and, given that one, in the second; its share of the samples."""

    first: Callable[[], Tensor]
    second: Callable[[Tensor], Tensor]
    share: float


def cut(closure: Callable[..., Tensor], batch: tuple[Any, ...], size: int | None, fraction: float) -> list[Chunk]:
    """A batch in chunks of `size` samples (None: one), the second pass on a `fraction` of each.

    Which samples these are, the losses of the first pass say: those of the largest loss where the closure returns one
    for each sample, as the efficient SAM chooses them (ESAM, ICLR 2022), else the first ones.

    Raises:
        TrainingError: there is something to cut, and no batch; the losses are not of the batch's samples.
    """
    if size is None and fraction == 1:
        return [Chunk(partial(closure, *batch), lambda _: closure(*batch), 1.0)]
    if not batch:
        raise TrainingError(
            "chunk_size and second_pass_fraction cut the batch, which step() therefore needs: "
            "opt.step(lambda x, y: loss_fn(gm(x), y), x, y)"
        )
    total = batch_size(batch)
    if not total:
        raise TrainingError("the batch has no samples")
    parts = [_part(batch, start, start + (size or total)) for start in range(0, total, size or total)]
    return [
        Chunk(partial(closure, *part), partial(_on_some, closure, part, fraction), batch_size(part) / total)
        for part in parts
    ]


def batch_size(batch: Any) -> int:
    """Samples of a batch: the common length of all its tensors.

    Args:
        batch: tensors in any nesting of tuples, lists and dicts.

    Raises:
        TrainingError: it holds no tensor, or tensors of different lengths.
    """
    leaves = pytree.tree_leaves(batch)
    others = {type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor) and hasattr(leaf, "shape")}
    if others:
        raise TrainingError(f"a batch to be cut must be of tensors; it has {', '.join(sorted(others))}")
    shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = {shape[0] if shape else None for shape in shapes}
    if len(sizes) != 1 or None in sizes:
        raise TrainingError(
            f"a batch can be cut where all of its tensors have the samples along their first axis; it has {shapes}"
        )
    return int(shapes[0][0])


def _on_some(closure: Callable[..., Tensor], batch: tuple[Any, ...], fraction: float, losses: Tensor) -> Tensor:
    """The loss of a fraction of the samples, given the losses of all."""
    total = batch_size(batch)
    count = math.ceil(round(fraction * total, 9))  # rounded, since 0.07 * 100 is a little more than 7
    if count == total:
        return closure(*batch)
    if not losses.dim():
        return closure(*_part(batch, 0, count))
    if len(losses) != total:
        raise TrainingError(
            f"the closure returned {len(losses)} losses for a batch of {total} samples: return one each"
        )
    hardest = losses.topk(count).indices.sort().values
    return closure(
        *pytree.tree_map(lambda leaf: leaf[hardest.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, batch)
    )


def _part(batch: Any, start: int, end: int) -> Any:
    return pytree.tree_map(lambda leaf: leaf[start:end] if isinstance(leaf, Tensor) else leaf, batch)
