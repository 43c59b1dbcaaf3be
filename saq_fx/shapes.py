"""Shapes of every tensor in a graph, found by running it once."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from saq_fx.annotation import Shape
from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule, call_arguments, graphs
from saq_fx.state import unmoved
from saq_fx.tracing import ExampleInputs, split_inputs

NodeShapes = dict[fx.Node, list[Shape]]


def output_shapes(gm: SaqGraphModule, example_inputs: ExampleInputs) -> NodeShapes:
    """Shapes of each node's tensor, for one sample, in evaluation mode: one for each time that the node runs.

    The first axis that all example tensors share is taken for the batch and cut to one sample; where the model does
    not run on that, or where a cut would change more than the first axis of its layers, the inputs are taken whole.

    Raises:
        TracingError: the graph does not run on the example inputs.
    """
    args, kwargs = split_inputs(example_inputs)
    whole = _run(gm, args, kwargs)
    batch = _batch_size((args, kwargs))
    if batch is None or batch == 1:
        return whole
    try:
        single = _run(gm, *_first_sample((args, kwargs)))
    except TracingError:
        return whole
    return single if _cut_only_the_batch(whole, single, batch) else whole


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within: evaluation mode without gradients. Afterwards each submodule has the mode it had."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for each, mode in modes.items():
            each.training = mode


class _Interpreter(fx.Interpreter):
    """Runs one graph, of a whole model or of a part of it, and shows each value to `see`."""

    def __init__(self, gm: SaqGraphModule, see: Callable[[fx.Node, Any], None] | None) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self._gm, self._see = gm, see

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*bind_inputs(self._gm, args, kwargs))

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return call_arguments(n, self.env.__getitem__)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return next(self.args_iter)  # `*args` too is one value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self._see is not None:
            self._see(n, value)
        return value


@contextmanager
def interpreted(gm: SaqGraphModule, see: Callable[[fx.Node, Any], None] | None = None) -> Iterator[None]:
    """Within: a call of the model runs its graphs node by node, as they are now, and shows each value to `see`."""
    with replaced_forwards({each: _Interpreter(each, see) for _, each in graphs(gm)}):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Within: these functions run in the place of the modules' forwards."""
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module in forwards:
            vars(module).pop("forward", None)


def bind_inputs(gm: SaqGraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The graph's placeholders' values, in order, from positional and keyword inputs.

    Raises:
        TracingError: an input that the graph does not take, or a required one that is missing.
    """
    placeholders = {str(node.target): node for node in gm.graph.nodes if node.op == "placeholder"}
    names = [name for name in placeholders if not name.startswith("*")]
    rest = {"*": args[len(names) :], "**": {name: value for name, value in kwargs.items() if name not in names}}
    taken = {name[: name.rfind("*") + 1] for name in placeholders}
    if any(rest[stars] and stars not in taken for stars in rest):
        raise TracingError(
            f"the model takes inputs {', '.join(placeholders)}; got {len(args)} positional and {sorted(kwargs)}"
        )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    missing = [name for name in names if name not in given and not placeholders[name].args]
    if missing:
        raise TracingError(f"example_inputs lack {', '.join(missing)}")
    return tuple(
        rest[name[: name.rfind("*") + 1]]
        if name.startswith("*")
        else given[name]
        if name in given
        else placeholders[name].args[0]
        for name in placeholders
    )


def _run(gm: SaqGraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NodeShapes:
    shapes: NodeShapes = {}

    def note(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            shapes.setdefault(node, []).append(tuple(value.shape))

    bind_inputs(gm, args, kwargs)
    try:
        with evaluating(gm), unmoved(gm), torch.random.fork_rng(), interpreted(gm, note):
            gm(*args, **kwargs)
    except Exception as error:
        given = [tuple(each.shape) for each in tensors_in((args, kwargs))]
        raise TracingError(f"the graph does not run on the example inputs of shapes {given}: {error}") from error
    return shapes


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda item: found.append(item) if isinstance(item, Tensor) else None)
    return found


def _batch_size(inputs: Any) -> int | None:
    """The common length of the first axis of all input tensors, None where they differ."""
    lengths = {tensor.shape[0] for tensor in tensors_in(inputs) if tensor.dim() > 0}
    return lengths.pop() if len(lengths) == 1 else None


def _first_sample(inputs: Any) -> Any:
    return fx.node.map_aggregate(inputs, lambda item: item[:1] if isinstance(item, Tensor) and item.dim() > 0 else item)


def _cut_only_the_batch(whole: NodeShapes, single: NodeShapes, batch: int) -> bool:
    """Whether every tensor has the same axes in both runs but for one that holds the batch."""
    if {node: len(shapes) for node, shapes in whole.items()} != {node: len(shapes) for node, shapes in single.items()}:
        return False
    pairs = (pair for node, shapes in whole.items() for pair in zip(single[node], shapes, strict=True))
    for cut, shape in pairs:
        if len(cut) != len(shape):
            return False
        changed = [(one, many) for one, many in zip(cut, shape, strict=True) if one != many]
        if len(changed) > 1 or any(many != one * batch for one, many in changed):
            return False
    return True
