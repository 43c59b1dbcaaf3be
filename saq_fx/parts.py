"""Parts: the graphs of what Python code calls and computes, in the places of it."""

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from saq_fx.annotation import join_path, record_of, update_record
from saq_fx.copying import keep_copyable
from saq_fx.eager import without_fused_layers
from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule
from saq_fx.held import replace_references
from saq_fx.inputs import Inputs
from saq_fx.modes import remove_flags
from saq_fx.nested import cloned
from saq_fx.operators import operator_of
from saq_fx.places import place_and_cause
from saq_fx.products import Product, add_products
from saq_fx.recording import INPUT, CallRecorder, Calls
from saq_fx.shapes import does_not_run, without_trace
from saq_fx.tracing import modes_of
from saq_fx.uncounted import has_weights, not_in_table

Capture = Callable[[nn.Module, Calls], SaqGraphModule]


class ReachingError(TracingError):
    """Python code calls modules that are not in its own, where a graph has no place for parts."""


def capture_parts(
    gm: SaqGraphModule,
    model: nn.Module,
    untraceable: Mapping[str, str],
    inputs: Inputs,
    others: Sequence[Inputs],
    capture: Capture,
) -> None:
    """Replaces the modules that untraceable code calls by graphs of their own.

    Args:
        gm: the graph of `model`, in which modules are nodes that stay Python code.
        untraceable: the paths of these, and why they do.
        inputs, others: what the model is called with.
        capture: makes a graph of a module that takes the inputs of all its calls.

    Raises:
        ReachingError: such code calls modules that are not in its own.
        TracingError: the model does not run on the inputs.
    """
    reasons = {model.get_submodule(path): reason for path, reason in untraceable.items()}
    recorder = _record(model, reasons, inputs, others)
    while crossed := _crossed(recorder):
        reasons.update(crossed)
        recorder = _record(model, reasons, inputs, others)
    if recorder.is_reaching:
        raise ReachingError("a module in it that stays Python code calls modules that are not in that")
    splitter = _Splitter(recorder.calls, reasons, capture)
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

    def __init__(
        self, calls: Mapping[nn.Module | Product, Calls], python: Iterable[nn.Module], capture: Capture
    ) -> None:
        self.parts: dict[nn.Module | Product, SaqGraphModule] = {}
        self.paths: list[str] = []
        self.untraced: list[tuple[str, str]] = []
        self._calls, self._python, self._capture = calls, set(python), capture
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
                part = self._capture(module, calls)
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
