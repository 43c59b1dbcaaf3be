"""Which guards of a graph refuse inputs of other sizes that the model itself takes."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from saq_fx.annotation import owner_path
from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule
from saq_fx.nested import cloned, map_tensors
from saq_fx.runtime import require_same_path
from saq_fx.shapes import bind_inputs, failure_of, interpreted, without_trace
from saq_fx.tracing import Inputs

_SAMPLES: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: 1)
_LONGER: tuple[Callable[[int], int], ...] = (lambda size: size * 3 // 2, lambda size: 2 * size, lambda size: size + 1)
_NEARBY: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: size - 1)


def refusing_modules(gm: SaqGraphModule, model: nn.Module, inputs: Inputs) -> tuple[dict[str, str], Inputs] | None:
    """Modules whose code the graph cannot follow on inputs of another size, by path, and why; and these inputs.

    None where there are none. Tried are one sample more, one alone, larger images, and longer and shorter sequences.
    What one module asks at a line of its code, and gets another answer, others of its class will at yet other sizes.
    """
    guards = [node for node in gm.graph.nodes if node.target is require_same_path]
    for resized in _resized(inputs) if guards else ():
        refusals = _refusals(gm, resized, guards[-1])
        if refusals and failure_of(model, resized) is None:
            first, problem = next(iter(refusals.items()))
            reason = f"the path through its code depends on the sizes of inputs: {problem}"
            asked = _asked(model, first)
            return {owner_path(guard): reason for guard in guards if _asked(model, guard) == asked}, resized
    return None


def _asked(model: nn.Module, guard: fx.Node) -> tuple[type, str]:
    """The class whose code asked for what a guard guards, and the line."""
    return type(model.get_submodule(owner_path(guard))), str(guard.args[3]).rpartition(", ")[2]


class _Done(Exception):
    """Nothing more is asked of a run."""


def _refusals(gm: SaqGraphModule, inputs: Inputs, last: fx.Node) -> Mapping[fx.Node, str]:
    """The guards that fail on these inputs, as far as the graph runs on them and up to the last one."""
    found: dict[fx.Node, str] = {}

    def run(part: SaqGraphModule, node: fx.Node, values: Mapping[fx.Node, Any], compute: Callable[[], Any]) -> Any:
        if node.target is not require_same_path:
            return compute()
        try:
            compute()
        except TracingError as error:
            found[node] = str(error)
        if node is last:
            raise _Done
        return None

    try:
        args, kwargs = cloned(inputs)
        bind_inputs(gm, args, kwargs)
        with without_trace(gm), interpreted(gm, run):
            gm(*args, **kwargs)
    except Exception:
        return found
    return found


def _resized(inputs: Inputs) -> Iterator[Inputs]:
    """Inputs of other sizes."""
    for change in _SAMPLES:
        yield _with_axis(inputs, 0, (1, 2, 3, 4, 5), change)
    for change in _LONGER:
        yield _with_axis(_with_axis(inputs, -1, (4, 5), change), -2, (4, 5), change)
    for axis in (1, -1):
        for change in _NEARBY:
            yield _with_axis(inputs, axis, (2, 3), change)


def _with_axis(inputs: Inputs, axis: int, dimensions: tuple[int, ...], change: Callable[[int], int]) -> Inputs:
    """Inputs in which an axis of all tensors of so many dimensions is cut, or made longer by repeating its start."""

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() not in dimensions or tensor.layout is not torch.strided or not tensor.shape[axis]:
            return tensor
        index = torch.arange(change(tensor.shape[axis]), device=tensor.device) % tensor.shape[axis]
        return tensor.index_select(axis, index)

    resized: Inputs = map_tensors(resize, inputs)
    return resized
