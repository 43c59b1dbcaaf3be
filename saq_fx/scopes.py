"""Scopes that a model's forward opens, without gradients or autocast, while it is traced."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from saq_fx.dataflow import reads_shape_only
from saq_fx.errors import TracingError
from saq_fx.runtime import switch_autocast

_WITHOUT_GRADIENT = ("detach", "data", "argmax", "argmin", "argsort", torch.argmax, torch.argmin, torch.argsort)


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Within: a module or class has these attributes in the place of its own."""
    originals = {name: vars(owner)[name] for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


def is_recording(tracer: Any) -> Callable[[], bool]:
    """Tells whether what runs now is the forward that a tracer records: no example value, no other thread."""
    thread = threading.get_ident()
    return lambda: not tracer.is_evaluating and threading.get_ident() == thread


@contextmanager
def followed_scopes(tracer: Any) -> Iterator[None]:
    """Within: scopes are followed as far as a graph can hold them exactly; others are errors.

    - `no_grad` counts; the tracer takes care that nothing inside needs gradients, and then the scope changes nothing.
    - `autocast(enabled=False)` becomes nodes that turn autocast off and on again.
    - Whatever turns gradients or autocast on, or asks for them, depends on the caller's own scopes.
    - Scopes that set back the generator of random numbers, or choose among kernels of attention, change values.
    """
    with _followed_no_grad(tracer), _followed_autocast(tracer), _rejected(tracer):
        yield


@contextmanager
def _followed_no_grad(tracer: Any) -> Iterator[None]:
    recording = is_recording(tracer)
    enter, leave = vars(torch.no_grad)["__enter__"], vars(torch.no_grad)["__exit__"]

    def __enter__(scope: Any) -> Any:
        if not recording():
            return enter(scope)
        tracer.scopes_without_gradients += 1
        return None

    def __exit__(scope: Any, *error: Any) -> Any:
        if not recording():
            return leave(scope, *error)
        tracer.scopes_without_gradients -= 1
        return None

    with replaced(torch.no_grad, __enter__=__enter__, __exit__=__exit__):
        yield


@contextmanager
def _followed_autocast(tracer: Any) -> Iterator[None]:
    recording = is_recording(tracer)
    original = {name: vars(torch.autocast)[name] for name in ("__init__", "__enter__", "__exit__")}
    entered: list[tuple[Any, Any]] = []

    def __init__(
        scope: Any, device_type: str, dtype: Any = None, enabled: bool = True, cache_enabled: Any = None
    ) -> Any:
        if not recording():
            return original["__init__"](scope, device_type, dtype, enabled, cache_enabled)
        scope.device, scope._enabled = device_type, enabled
        return None

    def __enter__(scope: Any) -> Any:
        if not recording():
            return original["__enter__"](scope)
        if scope._enabled:
            raise TracingError("forward turns autocast on, which a graph leaves to its caller")
        entered.append((scope, tracer.create_proxy("call_function", switch_autocast, (scope.device, False), {})))
        return scope

    def __exit__(scope: Any, *error: Any) -> Any:
        if not recording():
            return original["__exit__"](scope, *error)
        if entered and entered[-1][0] is scope:
            tracer.create_proxy("call_function", switch_autocast, (scope.device, entered.pop()[1]), {})
        return False

    with replaced(torch.autocast, __init__=__init__, __enter__=__enter__, __exit__=__exit__):
        yield


@contextmanager
def _rejected(tracer: Any) -> Iterator[None]:
    recording = is_recording(tracer)

    def reject(function: Callable[..., Any], reason: str, by_torch: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = sys._getframe(1)
            # Torch's own layers ask in order to choose between ways to the same values.
            is_torch_s = caller.f_globals.get("__name__", "").partition(".")[0] == "torch"
            if not recording() or (is_torch_s and not by_torch):
                return function(*args, **kwargs)
            if caller.f_code.co_name == "maybe_autocast":
                return True  # transformers asks so as to open no scope where it would change nothing
            raise TracingError(reason)

        return call

    def rejected(owner: Any, name: str, reason: str, by_torch: bool = False) -> Any:
        return replaced(owner, **{name: reject(vars(owner)[name], reason, by_torch)})

    asks = "control flow depends on {}, which the caller decides"
    with (
        rejected(torch, "is_grad_enabled", asks.format("is_grad_enabled()")),
        rejected(torch, "is_autocast_enabled", asks.format("is_autocast_enabled()")),
        rejected(torch.enable_grad, "__enter__", "forward turns gradients on, which a graph leaves to its caller"),
        rejected(torch.set_grad_enabled, "__init__", "forward sets whether gradients are recorded"),
        rejected(torch.inference_mode, "__enter__", "forward enters inference mode, which no graph does"),
        rejected(torch, "manual_seed", "forward seeds the generator, which no graph does"),
        rejected(
            torch, "get_rng_state", "forward keeps the state of the generator, which no graph does", by_torch=True
        ),
        rejected(torch.nn.attention, "_sdpa_kernel", "forward chooses kernels of attention, which no graph does", True),
        rejected(torch.autograd, "grad", "forward computes gradients, which no graph does"),
        rejected(torch.autograd, "backward", "forward computes gradients, which no graph does"),
    ):
        yield


class GradientFlow:
    """Which nodes of a graph that is being recorded may need gradients."""

    def __init__(self, root: nn.Module, arguments: Mapping[str, Any] | None) -> None:
        self._root, self._arguments = root, arguments
        self._parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
        self._found: dict[fx.Node, bool] = {}

    def reaches(self, node: fx.Node) -> bool:
        """Whether a node's value may have been computed from parameters or from an input with gradients."""
        for each in node.graph.nodes:
            if each not in self._found:
                self._found[each] = self._needs_gradient(each)
        return self._found[node]

    def stops_at(self, node: fx.Node) -> None:
        """Notes that a node's value has a type without gradients."""
        self._found[node] = False

    def _needs_gradient(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            if self._arguments is None:
                return True
            found: list[bool] = []
            fx.node.map_aggregate(self._arguments.get(str(node.target)), lambda item: found.append(_is_float(item)))
            return any(found)
        if node.op == "get_attr":
            return str(node.target) in self._parameters
        if reads_shape_only(node) or node.target in _WITHOUT_GRADIENT:
            return False
        if node.target is getattr and node.args[1] in _WITHOUT_GRADIENT:
            return False
        if node.op == "call_module" and any(True for _ in self._root.get_submodule(str(node.target)).parameters()):
            return True
        return any(self._found[source] for source in node.all_input_nodes)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
