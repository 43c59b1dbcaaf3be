"""From any model to a graph: the ways that there are, in order.

1. A `GraphModule` or an `ExportedProgram` is taken as it is.
2. Symbolic tracing (`saq_fx.tracing`), in which a submodule whose code cannot be followed is one node.
3. By parts: such a submodule, or the whole model, keeps its Python code, and each module that this code calls is
   captured by itself and put in its place, and so is each product that it computes (`saq_fx.products`). So they are
   quantized and counted, and control flow is what it was. What no graph takes stays in float, and is listed.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules import module as _calls
from torch.nn.modules.lazy import LazyModuleMixin

from saq_fx.annotation import record_of
from saq_fx.copying import copied
from saq_fx.eager import run_eagerly
from saq_fx.errors import TracingError
from saq_fx.exported import from_exported
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import ExampleInputs, Inputs, bound_arguments, default_in_graph, is_plain, split_inputs
from saq_fx.modes import remove_flags
from saq_fx.nested import cloned
from saq_fx.parts import ReachingError, capture_parts
from saq_fx.places import place_and_cause
from saq_fx.products import remove_products
from saq_fx.recording import Calls
from saq_fx.resizing import refusing_modules
from saq_fx.runtime import require_given
from saq_fx.shapes import interpreted, without_trace
from saq_fx.symbolic import overrides_call
from saq_fx.tracing import frozen_modes, modes_of, trace, trace_symbolically


def capture(model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None = None) -> SaqGraphModule:
    """Captures a copy of a model; the model itself is not changed.

    Args:
        model: any module; a `GraphModule` or an `ExportedProgram` is taken as it is.
        example_inputs: tells which optional arguments of `forward` are in use; the others are fixed at their defaults.
            Without it a model can only be captured as a whole.

    Raises:
        TracingError: naming the module, the source line and what to do.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if isinstance(model, ExportedProgram):
        return from_exported(copy.deepcopy(model))
    if isinstance(model, fx.GraphModule):
        return trace(model)
    _check_kind(model)
    return _capture(copied(model), None if example_inputs is None else split_inputs(example_inputs))


def capture_around(model: nn.Module, example_inputs: ExampleInputs, reason: str) -> SaqGraphModule:
    """Captures a copy of a model by parts: its own code stays Python, for that reason."""
    return _capture_around(copied(model), split_inputs(example_inputs), reason)


def _check_kind(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise TracingError(f"the model is wrapped in {name}: prepare its .module, and wrap the result")
    if _calls._global_forward_hooks or _calls._global_forward_pre_hooks:
        raise TracingError(
            "hooks that run at the calls of all modules are installed (register_module_forward_hook), which no graph "
            "does: remove them, or register them on the modules of the model"
        )
    for path, module in model.named_modules():
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise TracingError(
                f"module {path or 'the model itself'!r} of {name} is lazy and has no weights yet: run the model once "
                "before it is prepared"
            )
        if isinstance(module, SaqGraphModule) and record_of(module).recipe is not None:
            raise TracingError(
                f"module {path!r} of {name} is quantized already: prepare the model with the module that it was made "
                "from"
            )
        if isinstance(module, torch.jit.ScriptModule):
            # Nor does a copy of it receive gradients.
            raise TracingError(
                f"module {path or 'the model itself'!r} of {name} is scripted, and its code cannot be rewritten: "
                "prepare the model with the module that it was made from"
            )


def _capture(model: nn.Module, inputs: Inputs | None, calls: Sequence[Inputs] = ()) -> SaqGraphModule:
    """Captures the module itself; submodules that become parts are replaced in it.

    Args:
        inputs: examples, the first of `calls` if there are any.
        calls: inputs that the graph must take; guards that one of them fails are a reason to keep Python code.
    """
    try:
        gm, untraceable = trace_symbolically(model, inputs)
    except TracingError as error:
        if inputs is None:
            raise
        return _capture_around(model, inputs, str(error), calls[1:])
    others = list(calls[1:])
    while inputs is not None and (found := refusing_modules(gm, model, inputs)) is not None:
        refusing, resized = found
        remove_flags(model)
        others.append(resized)
        try:
            if "" in refusing:
                return _capture_around(model, inputs, refusing[""], others)
            gm, untraceable = trace_symbolically(model, inputs, untraceable | refusing)
        except TracingError:
            remove_flags(model)
            gm, untraceable = trace_symbolically(model, inputs, untraceable)
            break
    if inputs is not None and (problem := _failure_on(gm, calls)) is not None:
        return _capture_around(model, inputs, problem, others)
    if untraceable and inputs is not None:
        try:
            capture_parts(gm, model, untraceable, inputs, others, _accepting_all)
        except ReachingError as error:
            return _capture_around(model, inputs, str(error), others)
    return gm


def _capture_around(model: nn.Module, inputs: Inputs, reason: str, others: Sequence[Inputs] = ()) -> SaqGraphModule:
    """Keeps the module's own code, and captures what it calls; there may be `others` that it is called with."""
    if overrides_call(model):
        raise TracingError(
            f"{reason}. Nor can its code stay Python, since {type(model).__name__} overrides __call__, of which only "
            "forward would be left: do in forward what it does"
        )
    remove_flags(model)
    remove_products(model)
    gm = SaqGraphModule.around(model, _python_graph(model, inputs))
    gm.keep_modes(frozen_modes(model, modes_of(model)))
    capture_parts(gm, model, {"": reason}, inputs, others, _accepting_all)
    record = record_of(gm)
    if record.untraced and not record.parts:
        raise TracingError(
            f"{reason}. Nor can it be captured by parts, since this code itself multiplies tensors "
            f"({', '.join(name for name, _ in record.untraced)}): put these operations into modules of their own"
        )
    return gm


def _python_graph(model: nn.Module, inputs: Inputs) -> fx.Graph:
    """A graph that runs the model's own forward; arguments whose defaults no graph can hold are left at them."""
    graph, signature, given = fx.Graph(), inspect.signature(model.forward), bound_arguments(model, inputs)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    by_position = len(signature.parameters) if inspect.Parameter.VAR_POSITIONAL in kinds else len(inputs[0])
    positional: list[fx.Node] = []
    keyword: dict[str, fx.Node] = {}
    more: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        default = parameter.default
        plain = is_plain(default)
        if parameter.kind is parameter.VAR_POSITIONAL:
            more["more_args"] = graph.placeholder(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            more["more_kwargs"] = graph.placeholder(f"**{name}")
        elif not plain and name not in given:
            by_position = 0
        else:
            node = graph.create_node("placeholder", name, default_in_graph(graph, parameter), {})
            if node.args and not plain:
                graph.call_function(require_given, (node, name))
            is_named = parameter.kind is parameter.KEYWORD_ONLY or len(positional) >= by_position
            if parameter.kind is parameter.POSITIONAL_ONLY or not is_named:
                positional.append(node)
            else:
                keyword[name] = node
                defaults |= {name: default} if plain else {}
    if defaults:
        more["defaults"] = defaults
    graph.output(graph.call_function(run_eagerly, (graph.get_attr("python_model"), positional, keyword), more))
    return graph


def _accepting_all(module: nn.Module, calls: Calls) -> SaqGraphModule:
    """A graph that takes the inputs of every call."""
    if not calls.inputs:
        return _capture(module, None)
    if not type(module).__module__.startswith("torch.nn.") and any(map(_passes_none, calls.inputs)):
        return _capture_around(module, calls.inputs[0], "other calls may give it what is None here", calls.inputs[1:])
    return _capture(module, calls.inputs[0], calls.inputs)


def _failure_on(gm: SaqGraphModule, calls: Sequence[Inputs]) -> str | None:
    """Where and why a graph does not run on the inputs of all calls, None where it does."""
    if not calls:
        return None
    try:
        with without_trace(gm), interpreted(gm):
            for args, kwargs in cloned(calls):
                gm(*args, **kwargs)
    except Exception as error:
        return place_and_cause(error)
    return None


def _passes_none(inputs: Inputs) -> bool:
    return any(each is None for each in (*inputs[0], *inputs[1].values()))
