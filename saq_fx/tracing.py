"""From a model to a graph: symbolic tracing that keeps `train()` and `eval()` alive.

`fx` freezes `self.training` at the value it had while tracing. Here each module's flag is replaced, for the time of
tracing, by a marker: where the flag is passed on to a function it becomes a node that reads it anew at every call;
where it steers an `if`, the model is traced in both modes and the two graphs are merged (`saq_fx.modes`).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from saq_fx.annotation import copy_record, update_record
from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule
from saq_fx.modes import merge_modes
from saq_fx.proxies import TrainingMarker
from saq_fx.runtime import switch_autocast
from saq_fx.state import Kept, forgotten
from saq_fx.symbolic import SymbolicTracer, add_training_flag, place_and_cause

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
        return gm
    return trace_symbolically(model, None if example_inputs is None else split_inputs(example_inputs))[0]


def trace_symbolically(model: nn.Module, inputs: Inputs | None) -> tuple[SaqGraphModule, dict[str, str]]:
    """A graph of the model itself, and the submodules that had to stay leaves: path -> reason.

    Raises:
        TracingError: naming the module and the source line that symbolic tracing cannot follow.
    """
    arguments, fixed = _arguments(model, inputs)
    positional = _required_arguments(model) if inputs is None else len(inputs[0])
    graph, untraceable = _symbolic_graph(
        model, lambda kept: SymbolicTracer(arguments, fixed, positional, kept), modes_of(model)
    )
    gm = SaqGraphModule(model, graph, type(model).__name__)
    gm.keep_modes(frozen_modes(model))
    update_record(gm, tracing="symbolic")
    return gm, untraceable


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; raises TracingError, saying why and what to do, for a model that has none."""
    # torch.nn.utils.weight_norm and spectral_norm leave a weight with a history, which they make anew at each call.
    memo: dict[int, Any] = {}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            weight = vars(module).get(getattr(hook, "name", ""))
            if isinstance(hook, WeightNorm | SpectralNorm) and isinstance(weight, Tensor) and not weight.is_leaf:
                memo[id(weight)] = weight.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TracingError(
            f"{type(model).__name__} cannot be copied ({error}), and prepare_saq never changes the model it is given: "
            "remove attributes that do not deepcopy, such as tensors with a history or open files"
        ) from error


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


def modes_of(model: nn.Module) -> dict[bool, dict[nn.Module, bool]]:
    """The mode of every module after `train()` and after `eval()`, which the model may have overridden."""
    modules = list(model.modules())
    if all(type(each).train is nn.Module.train and "train" not in vars(each) for each in modules):
        return {mode: dict.fromkeys(modules, mode) for mode in (True, False)}
    modes, trainable = [each.training for each in modules], [each.requires_grad for each in model.parameters()]
    try:
        found = {}
        for mode in (True, False):
            model.train(mode)
            found[mode] = {each: each.training for each in modules}
        return found
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for parameter, flag in zip(model.parameters(), trainable, strict=True):
            parameter.requires_grad_(flag)


def frozen_modes(model: nn.Module) -> dict[bool, dict[str, bool]]:
    """The modules, by path, that `train()` and `eval()` leave in the other mode."""
    modes = modes_of(model)
    paths = list(model.named_modules(remove_duplicate=False))
    return {mode: {path: not mode for path, each in paths if modes[mode][each] != mode} for mode in modes}


def _required_arguments(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(each.kind is not each.KEYWORD_ONLY and each.default is each.empty for each in parameters)


@contextmanager
def _marked_training(model: nn.Module, modes: Mapping[nn.Module, bool]) -> Iterator[list[TrainingMarker]]:
    """Within: every `training` flag is a marker of the module's mode. Afterwards all is as it was."""
    saved = {module: module.training for module in model.modules()}
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


def _symbolic_graph(
    model: nn.Module, tracer: Callable[[Kept], SymbolicTracer], modes: Mapping[bool, Mapping[nn.Module, bool]]
) -> tuple[fx.Graph, dict[str, str]]:
    mode = model.training
    with _marked_training(model, modes[mode]) as markers:
        graph, untraceable = _run_tracer(model, tracer)
    if not any(marker.steered for marker in markers):
        return graph, untraceable
    with _marked_training(model, modes[not mode]):
        other, further = _run_tracer(model, tracer)
    if _count_scopes(graph) != _count_scopes(other):
        raise TracingError(f"{type(model).__name__} opens scopes of autocast in one mode only, which no graph does")
    add_training_flag(model, mode)
    return merge_modes(graph, other) if mode else merge_modes(other, graph), further | untraceable


def _count_scopes(graph: fx.Graph) -> int:
    return sum(node.target is switch_autocast for node in graph.nodes)


def _run_tracer(model: nn.Module, make: Callable[[Kept], SymbolicTracer]) -> tuple[fx.Graph, dict[str, str]]:
    tracer = make({})
    try:
        graph = tracer.trace(model)
        if tracer.kept:
            # Once more, to see whether forward reads what it keeps, or only writes it.
            with forgotten(tracer.kept):
                tracer = make(tracer.kept)
                graph = tracer.trace(model)
        return graph, tracer.untraceable
    except Exception as error:
        path = next(reversed(tracer.module_stack.values()), ("", None))[0] or "the model itself"
        raise TracingError(
            f"{type(model).__name__} cannot be traced symbolically: module {path!r}, {place_and_cause(error)}"
        ) from error
