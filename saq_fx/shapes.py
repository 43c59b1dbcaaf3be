"""What a run of a graph tells: shapes and types of its tensors, and MACs of what the operator table lacks."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from itertools import takewhile
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from saq_fx.annotation import Shape, record_of
from saq_fx.eager import without_fused_layers
from saq_fx.errors import TracingError, with_notes
from saq_fx.example_values import evaluation_flags
from saq_fx.fitting import Observer
from saq_fx.graph import SaqGraphModule, attribute_at, call_arguments, called_module, graphs
from saq_fx.held import modules_in
from saq_fx.inputs import ExampleInputs, Inputs, split_inputs
from saq_fx.mac_counter import MacCounter
from saq_fx.mutation import written_parameters
from saq_fx.nested import cloned, map_tensors, tensors_in
from saq_fx.operators import operands_of, operator_of
from saq_fx.state import runs_python, unmoved

NodeShapes = dict[fx.Node, list[Shape]]
Watch = Callable[[SaqGraphModule, fx.Node], bool]
Runner = Callable[[SaqGraphModule, fx.Node, Mapping[fx.Node, Any], Callable[[], Any]], Any]
"""Gives a node its value, from the values of other nodes and what computes it."""
Observers = Mapping[fx.Node, Mapping[int, Observer]]
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass
class Measured:
    """One run, by node: shapes of its tensor at each time that it ran, and a few facts more.

    `unfit` says of tensors that no quantizer takes what they are: not of dense real numbers, or masks; `macs` are those
    of the nodes that were watched.
    """

    shapes: NodeShapes = field(default_factory=dict)
    unfit: dict[fx.Node, str] = field(default_factory=dict)
    macs: dict[fx.Node, int] = field(default_factory=dict)


def measure(
    gm: SaqGraphModule,
    example_inputs: ExampleInputs,
    watch: Watch,
    observers: Observers = MappingProxyType({}),
) -> Measured:
    """Runs a graph in evaluation mode for what there is to know of one sample; leaves no trace in graph or inputs.

    The first axis that all example tensors share is taken for the batch and cut to one sample; where the model does
    not run on that, or where a cut would change more than the first axis of its layers, and the MACs by another factor
    (experts take what they are given of each sample), the inputs are taken whole.

    Args:
        watch: the nodes whose MACs are to be counted as they run.
        observers: are shown operands of nodes, by their positions, as they are in the whole example.

    Raises:
        TracingError: the graph does not run on the example inputs.
    """
    args, kwargs = split_inputs(example_inputs)
    whole = _run(gm, args, kwargs, watch, observers)
    batch = _batch_size((args, kwargs))
    if batch is None or batch == 1:
        return whole
    try:
        args, kwargs = _first_sample((args, kwargs), batch)
        single = _run(gm, args, kwargs, watch, {})
    except (TracingError, RuntimeError):  # torch cannot cut sparse tensors
        return whole
    is_batch = _cut_only_the_batch(whole.shapes, single.shapes, batch) or _multiplies_by(whole, single, batch)
    return single if is_batch else whole


def unfit_type(tensor: Tensor) -> str | None:
    """The type of a tensor that no quantizer takes, None of dense real numbers."""
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return None if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def is_mask(value: Any) -> bool:
    """Whether a value holds what masks are filled with, minus infinity or near to it: there is no level for that."""
    if not (isinstance(value, Tensor) and value.is_floating_point() and value.layout is torch.strided):
        return False
    has_values = value.numel() > 0 and not value.is_meta
    return has_values and float(value.min()) <= torch.finfo(value.dtype).min / 2


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Within: evaluation mode without gradients. Afterwards modes, state and random numbers are what they were."""
    parameters = list(model.parameters()) if _may_write_to_any(model) else written_parameters(model)
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        with evaluating(model), unmoved(model), torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, saved, strict=True):
                parameter.copy_(before)


def _may_write_to_any(model: nn.Module) -> bool:
    """Whether a model has Python code, which may write to any of its parameters, or in a graph to those of a leaf."""
    if not isinstance(model, SaqGraphModule) or record_of(model).parts or record_of(model).untraced:
        return True
    return any(runs_python(each) and any(True for _ in each.parameters()) for each in modules_in(model))


def failure_of(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What a model raises on inputs in evaluation mode, None where it runs."""
    args, kwargs = cloned(inputs)
    try:
        with without_trace(model), without_fused_layers():
            model(*args, **kwargs)
    except Exception as error:
        return error
    return None


def does_not_run(name: str, inputs: Any, problem: str) -> TracingError:
    """The error that says so of a model and its example inputs."""
    shapes = [tuple(each.shape) for each in tensors_in(inputs)]
    return TracingError(f"{name} does not run on the example inputs of shapes {shapes}: {problem}")


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within: evaluation mode without gradients. Afterwards each submodule has the mode it had."""
    with evaluation_flags(module), torch.no_grad():
        yield


class _Interpreter:
    """Runs one graph, of a whole model or of a part of it, each node by `run`."""

    def __init__(self, gm: SaqGraphModule, run: Runner | None) -> None:
        self._gm, self._run = gm, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph = self._gm.graph
        inputs = iter(graph.process_inputs(*bind_inputs(self._gm, args, kwargs)))
        values: dict[fx.Node, Any] = {}
        uses: dict[fx.Node, int] = {}
        for node in graph.nodes:
            compute = partial(self._compute, node, values, inputs)
            value = compute() if self._run is None else self._run(self._gm, node, values, compute)
            if node.op == "output":
                return graph.process_outputs(value)
            values[node], uses[node] = value, len(node.users)
            for each in node.all_input_nodes:
                uses[each] -= 1
                if not uses[each]:
                    del values[each]
        return None

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any], inputs: Iterator[Any]) -> Any:
        try:
            if node.op == "placeholder":
                return next(inputs)
            if node.op == "get_attr":
                return attribute_at(self._gm, str(node.target))
            args, kwargs = call_arguments(node, values.__getitem__)
            if node.op == "call_function":
                return node.target(*args, **kwargs)  # type: ignore[operator]
            if node.op == "call_module":
                return called_module(self._gm, node)(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return args[0]
        except Exception as error:
            error.add_note(f"while computing {node.format_node()}")
            raise


@contextmanager
def interpreted(gm: SaqGraphModule, run: Runner | None = None) -> Iterator[None]:
    """Within: a call of the model runs its graphs node by node, as they are now, each node by `run` where given."""
    with replaced_forwards({each: _Interpreter(each, run) for _, each in graphs(gm)}):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[_Module, Callable[..., Any]]) -> Iterator[None]:
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
    positional = list(takewhile(lambda name: not name.startswith("*"), placeholders))  # behind *args are keywords
    rest = {"*": args[len(positional) :], "**": {name: value for name, value in kwargs.items() if name not in names}}
    taken = {name[: name.rfind("*") + 1] for name in placeholders}
    if any(rest[stars] and stars not in taken for stars in rest):
        raise TracingError(
            f"the model takes inputs {', '.join(placeholders)}; got {len(args)} positional and {sorted(kwargs)}"
        )
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
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


def _run(
    gm: SaqGraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], watch: Watch, observers: Observers
) -> Measured:
    measured = Measured()

    def run(part: SaqGraphModule, node: fx.Node, values: Mapping[fx.Node, Any], compute: Callable[[], Any]) -> Any:
        value = compute() if node.op == "get_attr" else compute_watched(part, node, values, compute)
        if isinstance(value, Tensor):
            measured.shapes.setdefault(node, []).append(tuple(value.shape))
            unfit = unfit_type(value)
            if unfit is not None:
                measured.unfit[node] = unfit
        return value

    def compute_watched(
        part: SaqGraphModule, node: fx.Node, values: Mapping[fx.Node, Any], compute: Callable[[], Any]
    ) -> Any:
        for position, observer in observers.get(node, {}).items():
            operand = values[node.args[position]]  # type: ignore[index]
            if isinstance(operand, Tensor) and unfit_type(operand) is None:
                observer(operand)
        for each in operands_of(node):
            if each.op != "get_attr" and is_mask(values[each]):
                measured.unfit[each] = "infinite mask"
        if not watch(part, node):
            return compute()
        with MacCounter() as counter:
            value = compute()
        measured.macs[node] = measured.macs.get(node, 0) + counter.macs
        return value

    bind_inputs(gm, args, kwargs)
    try:
        with without_trace(gm), interpreted(gm, run):
            args, kwargs = cloned((args, dict(kwargs)))
            gm(*args, **kwargs)
    except Exception as error:
        raise does_not_run("the graph", (args, kwargs), with_notes(error)) from error
    return measured


def _batch_size(inputs: Any) -> int | None:
    """The common length of the first axis of all input tensors but those that samples share; None where they differ."""
    tensors: list[Tensor] = []
    _map_all(tensors.append, inputs)
    tensors = [tensor for tensor in tensors if tensor.dim() > 0]
    own = [tensor for tensor in tensors if not _may_be_shared(tensor)]
    lengths = {tensor.shape[0] for tensor in own or tensors}
    return lengths.pop() if len(lengths) == 1 else None


def _may_be_shared(tensor: Tensor) -> bool:
    """Whether a tensor looks as if all samples had it in common: a mask of positions by positions, or one for all."""
    is_square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1] and tensor.is_floating_point()
    return is_square or tensor.shape[0] == 1 or tensor.dtype == torch.bool


def _first_sample(inputs: Any, batch: int) -> Any:
    return _map_all(lambda tensor: tensor[:1] if tensor.dim() > 0 and tensor.shape[0] == batch else tensor, inputs)


def _map_all(function: Callable[[Tensor], Any], value: Any) -> Any:
    """As `map_tensors`, also in dataclasses."""

    def map_object(item: Any) -> Any:
        own = copy.copy(item)
        if is_dataclass(item):
            vars(own).update(_map_all(function, vars(item)))
        return own

    return map_tensors(function, value, map_object)


def arguments_in(node: fx.Node, shapes: NodeShapes) -> list[list[Any]]:
    """The arguments of each run of a node, with shapes in the place of tensors."""
    return [
        [shapes[arg][run] if isinstance(arg, fx.Node) and arg in shapes else arg for arg in node.args]
        for run in range(len(shapes.get(node, ())))
    ]


def macs_of(node: fx.Node, shapes: NodeShapes) -> int:
    """The MACs of all runs of a node, by the table's formula; 0 of one that calls no operation of the table."""
    entry = operator_of(node)
    return 0 if entry is None else sum(map(entry.macs, arguments_in(node, shapes), shapes.get(node, ())))


def _multiplies_by(whole: Measured, single: Measured, batch: int) -> bool:
    """Whether the MACs are so many times as many in the whole, with or without those that are the same in both runs.

    What does not depend on the samples is the same, and so may be what they share out among experts.
    """
    every, one = _macs_in(whole), _macs_in(single)
    changed = {node for node in {**every, **one} if every.get(node, 0) != one.get(node, 0)}
    with_same = (sum(every.values()), sum(one.values()))
    without = tuple(sum(macs.get(node, 0) for node in changed) for macs in (every, one))
    return bool(changed) and any(total == batch * of_one for total, of_one in (with_same, without))


def _macs_in(run: Measured) -> dict[fx.Node, int]:
    return run.macs | {node: macs_of(node, run.shapes) for node in run.shapes if node not in run.macs}


def _cut_only_the_batch(
    whole: Mapping[fx.Node, list[Shape]], single: Mapping[fx.Node, list[Shape]], batch: int
) -> bool:
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
