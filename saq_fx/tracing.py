"""From a model to a graph: symbolic tracing that keeps `train()` and `eval()` alive.

`fx` freezes `self.training` at the value it had while tracing. Here each module's flag is replaced, for the time of
tracing, by a marker: where the flag is passed on to a function it becomes a node that reads it anew at every call;
where it steers an `if`, the model is traced in both modes and the two graphs are merged (`saq_fx.modes`).
"""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from saq_fx.annotation import copy_record, update_record
from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule
from saq_fx.modes import UnmergeableError, add_flags, is_within, merge_modes
from saq_fx.symbolic import SymbolicTracer, TrainingMarker, place_and_cause

ExampleInputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def split_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Example inputs as (positional, keyword) arguments: a tensor, a sequence of positionals or a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def trace(model: nn.Module, example_inputs: ExampleInputs | None = None) -> SaqGraphModule:
    """Captures a copy of a model as one graph; the model itself is not changed.

    Args:
        model: any module; a `GraphModule` is taken as it is.
        example_inputs: tells which optional arguments of `forward` are in use; the others are fixed at their defaults.

    Raises:
        TracingError: naming the module and the source line that symbolic tracing cannot follow.
    """
    model = copied(model)
    if isinstance(model, fx.GraphModule):
        gm = SaqGraphModule(model, model.graph)
        copy_record(model, gm)
        update_record(gm, tracing="given graph")
        gm.recompile()  # where it was prepared before, no pass may change it
        return gm
    return trace_symbolically(model, None if example_inputs is None else split_inputs(example_inputs))[0]


def trace_symbolically(model: nn.Module, inputs: Inputs | None) -> tuple[SaqGraphModule, dict[str, str]]:
    """A graph of the model itself, and the submodules that had to stay leaves: path -> reason.

    Raises:
        TracingError: naming the module and the source line that symbolic tracing cannot follow.
    """
    graph, untraceable = _symbolic_graph(model, *_arguments(model, inputs))
    add_flags(model, graph)
    gm = SaqGraphModule(model, graph, type(model).__name__)
    update_record(gm, tracing="symbolic")
    return gm, untraceable


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; raises TracingError, saying why and what to do, for a model that has none."""
    try:
        return copy.deepcopy(model, _copies_of_empty_tables(model))
    except Exception as error:
        raise TracingError(
            f"{type(model).__name__} cannot be copied ({error}), and prepare_saq never changes the model it is given: "
            "remove attributes that do not deepcopy, such as tensors with a history or open files"
        ) from error


def _copies_of_empty_tables(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy` that knows all empty tables of hooks, ten a module, which take most of its time."""
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): OrderedDict() for value in values if type(value) is OrderedDict and not value}


def _arguments(model: nn.Module, inputs: Inputs | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Arguments of `forward` with example values (None: no examples), and those left at their defaults."""
    signature = inspect.signature(model.forward)
    given: dict[str, Any] | None = None
    if inputs is not None:
        args, kwargs = inputs
        try:
            given = dict(signature.bind_partial(*args, **kwargs).arguments)
        except TypeError as error:
            name = type(model).__name__
            raise TracingError(f"example_inputs do not fit {name}.forward{signature}: {error}") from error
    fixed = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty and name not in (given or {})
    }
    return given, fixed


@contextmanager
def _marked_training(model: nn.Module, training: bool) -> Iterator[list[TrainingMarker]]:
    """Within: every `training` flag is a marker of value `training`. Afterwards all is as it was."""
    saved = {module: module.training for module in model.modules()}
    markers = []
    for path, module in model.named_modules():
        marker = TrainingMarker(training, path)
        module.__dict__["training"] = marker
        markers.append(marker)
    try:
        yield markers
    finally:
        for module, flag in saved.items():
            module.__dict__["training"] = flag


@dataclass(frozen=True)
class _Trace:
    """What tracing in one mode gave; `steering` has the paths of modules whose code asks for modes, and of which."""

    graph: fx.Graph
    untraceable: dict[str, str]
    steering: dict[str, set[str]]


def _trace_in_mode(training: bool, model: nn.Module, tracer: SymbolicTracer) -> _Trace:
    with _marked_training(model, training) as markers:
        graph = _run_tracer(model, tracer)
    steering: dict[str, set[str]] = {}
    for marker in markers:
        for place in marker.asked_at:
            if not any(is_within(place, path) for path in tracer.untraceable):
                steering.setdefault(place, set()).add(marker.owner)
    return _Trace(graph, tracer.untraceable, steering)


def _symbolic_graph(
    model: nn.Module, arguments: dict[str, Any] | None, fixed: dict[str, Any]
) -> tuple[fx.Graph, dict[str, str]]:
    mode, leaves = model.training, dict[str, str]()
    while True:
        own = _trace_in_mode(mode, model, SymbolicTracer(arguments, fixed, leaves))
        if not own.steering:
            return own.graph, own.untraceable
        other = _trace_in_mode(not mode, model, SymbolicTracer(arguments, fixed, leaves))
        leaves = other.untraceable | own.untraceable
        if own.untraceable.keys() != other.untraceable.keys():
            continue
        places = own.steering.keys() | other.steering.keys()
        steering = {place: own.steering.get(place, set()) | other.steering.get(place, set()) for place in places}
        train, evaluation = (own, other) if mode else (other, own)
        try:
            return merge_modes(model, train.graph, evaluation.graph, steering), leaves
        except UnmergeableError as error:
            if not error.path or arguments is None:
                place = f"module {error.path or 'the model itself'!r}"
                raise TracingError(f"{type(model).__name__} cannot be traced symbolically: {place}, {error}") from error
            leaves[error.path] = str(error)


def _run_tracer(model: nn.Module, tracer: SymbolicTracer) -> fx.Graph:
    try:
        return tracer.trace(model)
    except Exception as error:
        path = tracer.current_path or "the model itself"
        raise TracingError(
            f"{type(model).__name__} cannot be traced symbolically: module {path!r}, {place_and_cause(error)}"
        ) from error
