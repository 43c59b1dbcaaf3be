"""From a model to a graph: symbolic tracing that keeps `train()` and `eval()` alive.

`fx` freezes `self.training` at the value it had while tracing. Here each module's flag is replaced, for the time of
tracing, by a marker: where the flag is passed on to a function it becomes a node that reads it anew at every call;
where it steers an `if`, the model is traced in both modes and the two graphs are merged (`saq_fx.modes`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from saq_fx.annotation import copy_record, update_record
from saq_fx.copying import copied
from saq_fx.errors import TracingError
from saq_fx.example_values import evaluation_flags
from saq_fx.graph import SaqGraphModule
from saq_fx.held import modules_in
from saq_fx.hooks import HookTables
from saq_fx.inputs import Arguments, ExampleInputs, Inputs, arguments_of, split_inputs
from saq_fx.modes import Merged, UnmergeableError, add_flags, is_within, merge_modes, remove_flags
from saq_fx.nested import cloned
from saq_fx.places import place_and_cause
from saq_fx.proxies import TrainingMarker
from saq_fx.sharpness import preserve_buffers
from saq_fx.state import Kept, forgotten, unmoved
from saq_fx.symbolic import SymbolicTracer


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
        return gm
    return trace_symbolically(model, None if example_inputs is None else split_inputs(example_inputs))[0]


def trace_symbolically(
    model: nn.Module, inputs: Inputs | None, leaves: Mapping[str, str] = MappingProxyType({})
) -> tuple[SaqGraphModule, dict[str, str]]:
    """A graph of the model itself, and the submodules that had to stay `leaves`: path -> reason.

    Raises:
        TracingError: naming the module and the source line that symbolic tracing cannot follow.
    """
    arguments, modes = arguments_of(model, inputs), modes_of(model)
    frozen = frozen_modes(model, modes)
    graph, untraceable = _symbolic_graph(model, arguments, modes, leaves)
    add_flags(model, graph)
    gm = SaqGraphModule(model, graph, type(model).__name__)
    gm.keep_modes(frozen)
    update_record(gm, tracing="symbolic")
    return gm, untraceable


def _call_once(model: nn.Module, inputs: Inputs) -> None:
    args, kwargs = cloned(inputs)
    with evaluation_flags(model), torch.no_grad(), torch.random.fork_rng(), preserve_buffers(model):
        model(*args, **kwargs)


def modes_of(model: nn.Module) -> dict[bool, dict[nn.Module, bool]]:
    """The mode of every module after `train()` and after `eval()`, which the model may have overridden."""
    modules = modules_in(model)
    if all(type(each).train is nn.Module.train and "train" not in vars(each) for each in modules):
        return {mode: dict.fromkeys(modules, mode) for mode in (True, False)}
    with _unchanged(model):
        found = {}
        for mode in (True, False):
            model.train(mode)
            found[mode] = {each: each.training for each in modules}
        return found


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Within: a model may run in any mode. Afterwards its modes, state and parameters are as before."""
    modes = {module: module.training for module in modules_in(model)}
    parameters = [(each, each.requires_grad, each.detach().clone()) for each in model.parameters()]
    try:
        with unmoved(model):
            yield
    finally:
        for parameter, flag, value in parameters:
            parameter.data.copy_(value)
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def frozen_modes(model: nn.Module, modes: Mapping[bool, Mapping[nn.Module, bool]]) -> dict[bool, dict[str, bool]]:
    """The modules, by path, that `train()` and `eval()` leave in the other mode, of the modes that they give."""
    differ = any(value != mode for mode, values in modes.items() for value in values.values())
    paths = list(model.named_modules(remove_duplicate=False)) if differ else []
    return {mode: {path: not mode for path, each in paths if modes[mode][each] != mode} for mode in modes}


@contextmanager
def _marked_training(model: nn.Module, modes: Mapping[nn.Module, bool]) -> Iterator[list[TrainingMarker]]:
    """Within: every `training` flag is a marker of the module's mode. Afterwards all is as it was."""
    saved = {module: module.training for module in modules_in(model)}
    markers = []
    for path, module in model.named_modules():
        marker = TrainingMarker(modes.get(module, model.training), path)
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


def _trace_in_mode(
    model: nn.Module, arguments: Arguments, leaves: Mapping[str, str], modes: Mapping[nn.Module, bool]
) -> _Trace:
    with _marked_training(model, modes) as markers:
        graph, untraceable = _run_tracer(model, arguments, leaves)
    steering: dict[str, set[str]] = {}
    for marker in markers:
        for place in marker.asked_at:
            if not any(is_within(place, path) for path in untraceable):
                steering.setdefault(place, set()).add(marker.owner)
    return _Trace(graph, untraceable, steering)


def _symbolic_graph(
    model: nn.Module,
    arguments: Arguments,
    modes: Mapping[bool, Mapping[nn.Module, bool]],
    known_leaves: Mapping[str, str],
) -> tuple[fx.Graph, dict[str, str]]:
    mode, leaves = model.training, dict(known_leaves)
    while True:
        own = _trace_in_mode(model, arguments, leaves, modes[mode])
        if not own.steering:
            return own.graph, own.untraceable
        other = _trace_in_mode(model, arguments, leaves, modes[not mode])
        leaves = other.untraceable | own.untraceable
        if own.untraceable.keys() != other.untraceable.keys():
            continue
        places = own.steering.keys() | other.steering.keys()
        steering = {place: own.steering.get(place, set()) | other.steering.get(place, set()) for place in places}
        train, evaluation = (own, other) if mode else (other, own)
        try:
            merged = merge_modes(model, train.graph, evaluation.graph, steering)
            _check_unsure(model, merged, arguments.given, modes)
            return merged.graph, leaves
        except UnmergeableError as error:
            if not error.path or arguments.given is None:
                place = f"module {error.path or 'the model itself'!r}"
                raise TracingError(f"{type(model).__name__} cannot be traced symbolically: {place}, {error}") from error
            leaves[error.path] = str(error)


def _check_unsure(
    model: nn.Module,
    merged: Merged,
    given: Mapping[str, Any] | None,
    modes: Mapping[bool, Mapping[nn.Module, bool]],
) -> None:
    """Raises UnmergeableError if a node of one mode only does not run on what the other mode gives it."""
    if given is None:
        return
    for mode in {not training for training, _ in merged.unsure.values()}:
        inputs = [given.get(str(node.target), *node.args) for node in merged.graph.nodes if node.op == "placeholder"]
        with _unchanged(model), torch.no_grad(), torch.random.fork_rng():
            for module, flag in modes[mode].items():
                module.training = flag
            add_flags(model, merged.graph)
            try:
                _Interpreter(model, merged.graph).run(*cloned(inputs))
            except _FailedError as error:
                training, place = merged.unsure.get(error.node, (mode, ""))
                if training != mode:
                    other = "training" if training else "evaluation"
                    raise UnmergeableError(place, f"what it does in {other} only fails in the other mode") from error
            finally:
                remove_flags(model)


class _FailedError(Exception):
    """A node failed."""

    def __init__(self, node: fx.Node) -> None:
        super().__init__(str(node))
        self.node = node


class _Interpreter(fx.Interpreter):
    """Runs a graph, and says which node fails."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        try:
            return super().run_node(n)
        except Exception as error:
            raise _FailedError(n) from error


def _tracer(arguments: Arguments, leaves: Mapping[str, str], forgotten: Kept) -> SymbolicTracer:
    return SymbolicTracer(arguments.given, arguments.fixed, arguments.positional, leaves, forgotten)


def _run_tracer(model: nn.Module, arguments: Arguments, leaves: Mapping[str, str]) -> tuple[fx.Graph, dict[str, str]]:
    tracer, hooks = _tracer(arguments, leaves, {}), HookTables(model)
    try:
        try:
            graph = tracer.trace(model)
        finally:
            # Forward installs hooks at its first call, and notes that it has: let it do both.
            installs = hooks.changed
            if installs:
                hooks.put_back()
                if arguments.inputs is not None:
                    _call_once(model, arguments.inputs)
        if installs and arguments.inputs is not None:
            tracer = _tracer(arguments, leaves, {})
            graph = tracer.trace(model)
        if "" in tracer.outside_of_graphs:
            raise TracingError(tracer.outside_of_graphs[""])
        if tracer.outside_of_graphs and arguments.inputs is None:
            path, reason = next(iter(tracer.outside_of_graphs.items()))
            raise TracingError(f"module {path!r}: {reason}; pass example_inputs to keep it")
        if tracer.outside_of_graphs:
            return _run_tracer(model, arguments, {**tracer.untraceable, **tracer.outside_of_graphs})
        if tracer.kept:
            # Once more, to see whether forward reads what it keeps, or only writes it.
            with forgotten(tracer.kept):
                tracer = _tracer(arguments, leaves, tracer.kept)
                graph = tracer.trace(model)
        return graph, tracer.untraceable
    except Exception as error:
        path = tracer.current_path or "the model itself"
        raise TracingError(
            f"{type(model).__name__} cannot be traced symbolically: module {path!r}, {place_and_cause(error)}"
        ) from error
