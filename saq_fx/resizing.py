"""Which guards of a graph refuse inputs of other sizes that the model itself takes."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from saq_fx.annotation import owner_path
from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import Inputs
from saq_fx.nested import cloned, map_tensors, tensors_in
from saq_fx.runtime import require_same_path
from saq_fx.shapes import bind_inputs, failure_of, interpreted, without_trace

_SAMPLES: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: 1)
_LONGER: tuple[Callable[[int], int], ...] = (lambda size: size * 3 // 2, lambda size: 2 * size, lambda size: size + 1)
_NEARBY: tuple[Callable[[int], int], ...] = (lambda size: size + 1, lambda size: size - 1, lambda size: 2 * size)


def refusing_modules(gm: SaqGraphModule, model: nn.Module, inputs: Inputs) -> tuple[dict[str, str], Inputs] | None:
    """Modules whose code the graph cannot follow on inputs of another size, by path, and why; and these inputs.

    None where there are none. Tried are one sample more, one alone, larger images, longer and shorter sequences, and
    one more of whatever there are.
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
    """Inputs of other sizes, each once."""
    seen = {_shapes(inputs)}
    for resized in _candidates(inputs):
        if (shapes := _shapes(resized)) not in seen:
            seen.add(shapes)
            yield resized


def _candidates(inputs: Inputs) -> Iterator[Inputs]:
    for change in _SAMPLES:
        yield _with_axis(inputs, 0, (1, 2, 3, 4, 5), change)
    yield _with_items(inputs)
    for change in _LONGER:
        yield _with_axis(_with_axis(inputs, -1, (4, 5), change), -2, (4, 5), change)
    for axis in (1, -1):
        for change in _NEARBY:
            yield _with_axis(inputs, axis, (2, 3), change)
    shapes = _shapes(inputs)
    # Axes of one size mostly belong together: steps of a video and of its masks, height and width wherever they are.
    for size in sorted({size for shape in shapes for size in shape}):
        yield map_tensors(partial(_with_size, size), inputs)
    for dimensions in sorted({len(shape) for shape in shapes}):
        for axis in range(1, dimensions):
            yield _with_axis(inputs, axis, (dimensions,), _NEARBY[0])


def _with_items(value: Any) -> Any:
    """A nested value with one item more in each list of tensors, or of dictionaries."""
    if isinstance(value, list):
        is_uniform = all(isinstance(item, Tensor) for item in value) or all(isinstance(item, dict) for item in value)
        return [_with_items(item) for item in (*value, *(value[:1] if is_uniform else ()))]
    if type(value) is tuple:
        return tuple(map(_with_items, value))
    return {name: _with_items(item) for name, item in value.items()} if type(value) is dict else value


def _shapes(inputs: Inputs) -> tuple[torch.Size, ...]:
    return tuple([tensor.shape for tensor in tensors_in(inputs)])


def _with_size(size: int, tensor: Tensor) -> Tensor:
    for axis in range(tensor.dim()):
        if tensor.shape[axis] == size:
            tensor = _resize(tensor, axis, size + 1)
    return tensor


def _with_axis(inputs: Inputs, axis: int, dimensions: tuple[int, ...], change: Callable[[int], int]) -> Inputs:
    """Inputs in which an axis of all tensors of so many dimensions is changed."""

    def resize(tensor: Tensor) -> Tensor:
        return _resize(tensor, axis, change(tensor.shape[axis])) if tensor.dim() in dimensions else tensor

    resized: Inputs = map_tensors(resize, inputs)
    return resized


def _resize(tensor: Tensor, axis: int, size: int) -> Tensor:
    """A tensor of which an axis is cut, or made longer by repeating its start."""
    if tensor.layout is not torch.strided or not tensor.shape[axis]:
        return tensor
    index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
    return tensor.index_select(axis, index)
