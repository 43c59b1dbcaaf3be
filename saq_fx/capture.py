"""From any model to a graph: the ways that there are, in order.

1. A `GraphModule` or an `ExportedProgram` is taken as it is.
2. Symbolic tracing (`saq_fx.tracing`), in which a submodule whose code cannot be followed is one node.
3. By parts: such a submodule, or the whole model, keeps its Python code, and each module that this code calls is
   captured by itself and put in its place, and so is each product that it computes (`saq_fx.products`). So they are
   quantized and counted, and control flow is what it was. What no graph takes stays in float, and is listed.
"""

import copy
import inspect
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.modules import module as _calls
from torch.nn.modules.lazy import LazyModuleMixin

from saq_fx.annotation import join_path, record_of, update_record
from saq_fx.copying import copied, keep_copyable
from saq_fx.eager import run_eagerly, without_fused_layers
from saq_fx.errors import TracingError
from saq_fx.exported import from_exported
from saq_fx.graph import SaqGraphModule
from saq_fx.held import replace_references
from saq_fx.modes import remove_flags
from saq_fx.nested import cloned
from saq_fx.operators import operator_of
from saq_fx.places import place_and_cause
from saq_fx.products import Product, add_products, remove_products
from saq_fx.recording import INPUT, CallRecorder, Calls
from saq_fx.resizing import refusing_modules
from saq_fx.runtime import require_given
from saq_fx.shapes import does_not_run, interpreted, without_trace
from saq_fx.symbolic import default_in_graph, is_plain, overrides_call
from saq_fx.tracing import (
    ExampleInputs,
    Inputs,
    bound_arguments,
    frozen_modes,
    modes_of,
    split_inputs,
    trace,
    trace_symbolically,
)
from saq_fx.uncounted import has_weights, not_in_table


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
            _capture_parts(gm, model, untraceable, inputs, others)
        except _ReachingError as error:
            return _capture_around(model, inputs, str(error), others)
    return gm


class _ReachingError(TracingError):
    """Python code calls modules that are not in its own, where a graph has no place for parts."""


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
    _capture_parts(gm, model, {"": reason}, inputs, others)
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


def _capture_parts(
    gm: SaqGraphModule,
    model: nn.Module,
    untraceable: Mapping[str, str],
    inputs: Inputs,
    others: Sequence[Inputs] = (),
) -> None:
    """Replaces the modules that untraceable code calls by graphs of their own."""
    reasons = {model.get_submodule(path): reason for path, reason in untraceable.items()}
    recorder = _record(model, reasons, inputs, others)
    while crossed := _crossed(recorder):
        reasons.update(crossed)
        recorder = _record(model, reasons, inputs, others)
    if recorder.is_reaching:
        raise _ReachingError("a module in it that stays Python code calls modules that are not in that")
    splitter = _Splitter(recorder.calls, reasons)
    for path, module in list(model.named_modules()):
        if module in reasons:
            splitter.split(module, path)
            listed = {name.rpartition(".")[2] for name, owner in recorder.operations.items() if owner is module}
            splitter.add_products(module, gm if module is model else module, path, listed)
    for module in reasons:
        replace_references(gm if module is model else module, splitter.parts)
        keep_copyable(module)
    _place(splitter.parts, recorder.calls)
    for name, owner in recorder.operations.items():
        splitter.untraced.append((name, f"runs in Python code that cannot be traced, {reasons[owner]}"))
    update_record(gm, tracing="by parts", parts=tuple(splitter.paths), untraced=tuple(splitter.untraced))


def _crossed(recorder: CallRecorder) -> dict[nn.Module, str]:
    """The modules that cannot be parts, and why: calls go into them, or out of them."""
    called = [each for each in recorder.calls if isinstance(each, nn.Module)]
    entered = [each for each in called if _holds_any(each, recorder.calls)]
    reaching = [each for each in called if each in recorder.reaching]
    outward = dict.fromkeys(reaching, "it calls modules that are not in it")
    return outward | dict.fromkeys(entered, "code outside of it calls modules in it")


def _holds_any(module: nn.Module, others: Container[Any]) -> bool:
    return any(inner in others for inner in module.modules() if inner is not module)


def _record(model: nn.Module, python: Iterable[nn.Module], example: Inputs, others: Sequence[Inputs]) -> CallRecorder:
    args, kwargs = inputs = cloned(example)
    recorder, known = CallRecorder(model, python), dict(model.named_modules())
    try:
        with without_trace(model), without_fused_layers(), recorder.following(inputs):
            model(*args, **kwargs)
    except Exception as error:
        raise does_not_run(type(model).__name__, inputs, place_and_cause(error)) from error
    for path, module in model.named_modules():
        if path not in known and module not in known.values() and any(True for _ in module.parameters()):
            raise TracingError(
                f"{type(model).__name__} creates module {path!r} when it runs first: run it once before it is prepared"
            )
    recorder.is_open = False
    # Code may hand on other arguments then, as in training, which parts must take, too.
    for other, modes in ((example, modes_of(model)[True]), *((other, {}) for other in others)):
        args, kwargs = inputs = cloned(other)
        with suppress(Exception), without_trace(model), without_fused_layers(), recorder.following(inputs):
            for module, mode in modes.items():
                module.training = mode
            model(*args, **kwargs)
    return recorder


class _Splitter:
    """Puts captured parts in the place of modules that Python code calls."""

    def __init__(self, calls: Mapping[nn.Module | Product, Calls], python: Iterable[nn.Module]) -> None:
        self.parts: dict[nn.Module | Product, SaqGraphModule] = {}
        self.paths: list[str] = []
        self.untraced: list[tuple[str, str]] = []
        self._calls, self._python = calls, set(python)
        self._done: set[nn.Module] = set()
        products = [each for each in calls if isinstance(each, Product)]
        self._multiplied = {id(weight) for product in products for weight in product.weights().values()}

    def split(self, holder: nn.Module, path: str) -> None:
        """Replaces the children of a module that stays Python code, or of a container in one."""
        for name, child in list(holder._modules.items()):
            if child is None or child in self._python:
                continue
            is_left = not (_is_container(child) or self._reaches_below(child) or self._is_read_by_products(child))
            if child not in self._done and (child in self._calls or is_left):
                self._capture_part(child, join_path(path, name))
            if child in self.parts:
                holder._modules[name] = self.parts[child]
            elif child not in self._calls:
                self.split(child, join_path(path, name))

    def add_products(self, module: nn.Module, holder: nn.Module, path: str, listed: Collection[str]) -> None:
        """Makes parts of the products that the module's own code computes; `holder` is what is left of the module."""
        found = [each for each in self._calls if isinstance(each, Product) and each.module is module]
        for product, (name, part) in add_products(module, holder, found, listed).items() if found else ():
            self.parts[product] = part
            self.paths.append(join_path(path, name))

    def _is_read_by_products(self, module: nn.Module) -> bool:
        """Whether its weights are quantized where they are multiplied, and not where it would be called."""
        return any(id(parameter) in self._multiplied for parameter in module.parameters())

    def _reaches_below(self, module: nn.Module) -> bool:
        return any(each in self._calls or each in self._python for each in module.modules())

    def _capture_part(self, module: nn.Module, path: str) -> None:
        """Captures a module that holds layers; one that no example reaches, without example inputs."""
        self._done.add(module)
        calls = self._calls.get(module, Calls())
        if calls.is_transformed:
            if has_weights(module):
                self.untraced.append((path, "runs under torch.vmap, in which nothing is quantized"))
            return
        try:
            with calls.scope():
                part = _accepting_all(module, calls)
            if _has_layers(part):
                part.act_as(module)
                self.parts[module] = part
                self.paths.append(path)
                return
            if has_weights(module):
                self.untraced.append((path, not_in_table(module)))
        except TracingError as error:
            is_one_layer = type(module).__module__.startswith("torch.nn.") and not module._modules
            self.untraced.append((path, not_in_table(module) if is_one_layer else str(error)))
        remove_flags(module)  # it stays as it is, and so must be what tracing it has added


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


def _is_container(module: nn.Module) -> bool:
    """Whether a module holds others and cannot be called itself."""
    return type(module).forward is nn.Module.forward and "forward" not in vars(module)


def _has_layers(gm: SaqGraphModule) -> bool:
    """Whether there is anything to quantize or, as of recurrent cells, to list."""
    if record_of(gm).parts or record_of(gm).untraced:
        return True
    for node in gm.graph.nodes:
        if operator_of(node) is not None:
            return True
        if node.op == "call_module" and any(p.dim() > 1 for p in gm.get_submodule(str(node.target)).parameters()):
            return True
    return False


def _place(parts: Mapping[nn.Module | Product, SaqGraphModule], calls: Mapping[nn.Module | Product, Calls]) -> None:
    """Writes down how each part stands in the data flow; one that no example reaches is neither first nor last."""
    feeding = {origin for module in parts if module in calls for origin in calls[module].origins}
    for module, part in parts.items():
        origins = calls[module].origins if module in calls else None
        update_record(
            part,
            is_first=origins is not None and not any(each in parts for each in origins),
            is_last=origins is not None and module not in feeding,
            reads_network_input=origins is not None and INPUT in origins,
        )
