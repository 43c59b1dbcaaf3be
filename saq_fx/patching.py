"""What is changed in torch while a model is traced, and only then."""

import builtins
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import FunctionCtx
from torch.fx import _symbolic_trace
from torch.nn.utils import stateless
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from saq_fx.bytecode import asks_for_type, multiplies
from saq_fx.eager import without_fused_layers
from saq_fx.errors import TracingError
from saq_fx.held import modules_in
from saq_fx.proxies import IN_PLACE_OPERATORS, GuardedAttribute, GuardedProxy, TrainingMarker, find_proxy
from saq_fx.runtime import apply_function, class_name, is_importable
from saq_fx.scopes import followed_scopes, is_recording, replaced

_FACTORIES = ("arange", "eye", "finfo", "iinfo", "linspace", "tensor")
# What is random must be drawn anew in each run, and what is filled in place must be made anew.
_ALWAYS_RECORDED = ("empty", "full", "normal", "ones", "rand", "randint", "randn", "randperm", "zeros")

# Whether a value is an instance of one of these steers a model; other checks are Python's own or torch's.
_TYPES_OF_VALUES = (Tensor, int, float, bool, str, list, tuple, dict)


@contextmanager
def patched(tracer: fx.Tracer) -> Iterator[None]:
    """Within: all of the below but for `telling_types`, for nodes of this tracer's graph."""
    with (
        _following_wrapped_products(),
        _recording_factories(tracer),
        _rejecting_transforms(),
        without_fused_layers(),
        followed_scopes(tracer),
        _recording_functions(tracer),
        _recording_numbers(tracer),
        _RealParameters(tracer),
    ):
        yield


@contextmanager
def _recording_factories(tracer: fx.Tracer) -> Iterator[None]:
    """Within: functions that make tensors are recorded, those without effects only where a size is symbolic."""
    # torch.compile keeps tables of torch's functions from when it is imported, which a model may do: not from here.
    importlib.import_module("torch._dynamo")
    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_ALWAYS_RECORDED)}
    for name in (*_FACTORIES, *_ALWAYS_RECORDED):
        setattr(torch, name, _recorded(originals[name], tracer if name in _ALWAYS_RECORDED else None))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _recorded(function: Callable[..., Any], always_by: fx.Tracer | None) -> Callable[..., Any]:
    """Becomes a node if any argument is a proxy, or always, in the graph of a tracer."""

    def record(*args: Any, **kwargs: Any) -> Any:
        proxy = find_proxy(args, kwargs)
        tracer: Any = always_by if proxy is None else proxy.tracer
        if tracer is None or tracer.is_evaluating:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return record


@contextmanager
def _rejecting_transforms() -> Iterator[None]:
    """Within: what runs functions in other ways than calling them is an error, for symbolic values.

    Of checkpoints a graph would lose the memory they save; modules that are lent other parameters have own ones there.
    """
    original = checkpoint._infer_device_type
    functorch: Any = importlib.import_module("torch._functorch.apis")
    vmapped = functorch.vmap_impl

    def reject_vmap(*args: Any, **kwargs: Any) -> Any:
        if find_proxy(args, kwargs) is not None:
            raise TracingError("torch.vmap runs its function on many samples at once, which no graph does")
        return vmapped(*args, **kwargs)

    lent = stateless._functional_call

    def reject_lent(*args: Any, **kwargs: Any) -> Any:
        if find_proxy(args, kwargs) is not None:
            raise TracingError("functional_call runs a module with other parameters than its own, which no graph does")
        return lent(*args, **kwargs)

    def reject(*args: Any) -> Any:
        if find_proxy(args, {}) is not None:
            raise TracingError("torch.utils.checkpoint runs its function a second time, which no graph does")
        return original(*args)  # type: ignore[no-untyped-call]

    checkpoint._infer_device_type = reject
    try:
        with replaced(functorch, vmap_impl=reject_vmap), replaced(stateless, _functional_call=reject_lent):
            yield
    finally:
        checkpoint._infer_device_type = original


@contextmanager
def _recording_functions(tracer: Any) -> Iterator[None]:
    """Within: a function with a backward of its own is one node, also where its `apply` was taken beforehand."""
    original = vars(torch.autograd.Function)["apply"]
    meta = type(torch.autograd.Function)

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        proxy = find_proxy(args, kwargs)
        if proxy is None or tracer.is_evaluating:
            return original.__get__(None, cls)(*args, **kwargs)
        if not is_importable(cls):
            raise TracingError(
                f"the autograd function {cls.__qualname__} is made in a function, where no graph finds it"
            )
        if any(map(callable, (each for each in args if not issubclass(type(each), fx.Proxy)))):
            raise TracingError(f"the autograd function {cls.__qualname__} runs code of the model, maybe once more")
        arguments = (class_name(cls), *args)
        return tracer.create_proxy("call_function", apply_function, arguments, kwargs, name=cls.__name__)

    def attribute(cls: Any, name: str) -> Any:
        value = type.__getattribute__(cls, name)
        return partial(forward, cls, value) if name == "forward" else value

    def forward(cls: type, own: Callable[..., Any], *args: Any) -> Any:
        # Torch's own `apply` takes symbolic values for constants, and would leave the backward out.
        if find_proxy(args, {}) is None or tracer.is_evaluating:
            return own(*args)
        return apply(cls, *(args[1:] if isinstance(args[0], FunctionCtx) else args))

    meta.__getattribute__ = attribute  # type: ignore[method-assign]
    try:
        with replaced(torch.autograd.Function, apply=classmethod(apply)):
            yield
    finally:
        del meta.__getattribute__


@contextmanager
def telling_types(tracer: Any) -> Iterator[None]:
    """Within: a symbolic value is an instance of what its value on the example inputs is one of.

    A property `__class__` of proxies would tell C++ code, too, which then takes a proxy's memory for a tensor's.
    Code that asks whether a value is symbolic, not to branch on it, is told so only of masks and tokens: of others it
    shall do what it does when it is not traced.
    """
    original, recording = builtins.isinstance, is_recording(tracer)
    stand_ins = {TrainingMarker, GuardedProxy, GuardedAttribute}

    def is_instance(value: Any, classes: Any, /) -> bool:
        kind = type(value)
        if kind not in stand_ins or (kind is not TrainingMarker and (value.tracer is not tracer or not recording())):
            return original(value, classes)
        if kind is TrainingMarker:
            return original(value, classes) or original(True, classes)
        if issubclass(kind, classes):
            return _is_own(sys._getframe(1)) or tracer.may_vary(value)
        if tracer.arguments is None and not original(classes, tuple) and classes not in _TYPES_OF_VALUES:
            return False
        return original(tracer.instance(value), classes)

    with replaced(builtins, isinstance=is_instance):
        yield


def _is_own(frame: FrameType) -> bool:
    """Whether the code of a frame is torch's or this library's."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in ("torch", "saq_fx")


class _WholeNumber(type):
    """Makes `int` and `float` nodes of what sizes decide, where code calls them; they are the types otherwise."""

    tracer: Any
    original: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        original = cls.original
        if len(args) != 1 or kwargs or type(args[0]) not in (GuardedProxy, GuardedAttribute):
            return original(*args, **kwargs)
        return cls.tracer.number(original, args[0])

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.original)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.original)

    def __eq__(cls, other: Any) -> bool:
        return other is cls.original or other is cls

    def __hash__(cls) -> int:
        return hash(cls.original)


@contextmanager
def _recording_numbers(tracer: Any) -> Iterator[None]:
    """Within: `int`, `float`, `len`, `max` and `min` of symbolic values are symbolic, where only sizes decide them."""
    recording, length = is_recording(tracer), builtins.len

    def symbolic_length(value: Any, /) -> Any:
        is_symbolic = type(value) in (GuardedProxy, GuardedAttribute) and value.tracer is tracer and recording()
        return tracer.length(value) if is_symbolic and not _is_own(sys._getframe(1)) else length(value)

    def extreme(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        values = args[0] if len(args) == 1 and type(args[0]) in (list, tuple) else args
        is_symbolic = any(type(each) in (GuardedProxy, GuardedAttribute) and each.tracer is tracer for each in values)
        if not is_symbolic or options or not recording() or _is_own(sys._getframe(1)):
            return function(*args, **options)
        return tracer.extreme(function, list(values[0]) if length(values) == 1 else values)

    names = {
        original.__name__: _WholeNumber(original.__name__, (original,), {"tracer": tracer, "original": original})
        for original in (int, float)
    }
    kinds = {kind for module in modules_in(tracer.root) for kind in type(module).__mro__}
    held = [(table, kind) for kind in kinds if (table := _globals_of(kind)) is not None]
    tables = {id(table): table for table, _ in held}
    # Torch and numpy know the types themselves only.
    code = [*((table, table) for table in tables.values()), *((table, vars(kind)) for table, kind in held)]
    kept = {(id(table), name) for table, functions in code for name in names if _ask_for_type(functions.values(), name)}
    changed = [
        (table, name)
        for key, table in tables.items()
        for name in names
        if name not in table and (key, name) not in kept
    ]
    try:
        for table, name in changed:
            table[name] = names[name]
        with replaced(builtins, len=symbolic_length, max=partial(extreme, max), min=partial(extreme, min)):
            yield
    finally:
        for table, name in changed:
            del table[name]


def _ask_for_type(functions: Iterable[Any], name: str) -> bool:
    return any(asks_for_type(each, name) for each in functions)


def _globals_of(kind: type) -> dict[str, Any] | None:
    """The globals of the code of a class that is neither torch's nor this library's."""
    if kind.__module__.partition(".")[0] in ("torch", "saq_fx", "builtins"):
        return None
    forward = inspect.unwrap(vars(kind).get("forward", None) or (lambda: None))
    return getattr(forward, "__globals__", None) or vars(sys.modules.get(kind.__module__, object()))


class _RealParameters(TorchFunctionMode):
    """Within: what forward computes from parameters other than by their names is an error, for no graph would see it.

    A loop over `parameters()` meets the tensors themselves; attributes meet proxies.
    """

    def __init__(self, tracer: Any) -> None:
        super().__init__()
        self._tracer, self._recording = tracer, is_recording(tracer)
        self._tensors: set[int] = set()
        self._plain: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs what reads sizes and types."""
        kwargs = kwargs or {}
        if find_proxy(args, kwargs) is not None or not self._recording():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        changes = name == "__set__" or (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE_OPERATORS
        if changes and (self._has_state(args, kwargs) or self._has_any(args, kwargs, self._plain)):
            raise TracingError(f"forward changes tensors of the model by {name} other than by their names")
        result = func(*args, **kwargs)
        computes = isinstance(result, Tensor) and not name.startswith("new_") and not name.endswith("_like")
        if computes and self._has_state(args, kwargs):
            raise TracingError(f"forward computes {name} of tensors of the model other than by their names")
        return result

    def _has_state(self, args: Any, kwargs: Any) -> bool:
        if not self._tensors:
            root = self._tracer.root
            self._tensors = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
            held = (value for module in root.modules() for value in vars(module).values())
            self._plain = {id(value) for value in held if isinstance(value, Tensor)}
        return self._has_any(args, kwargs, self._tensors)

    def _has_any(self, args: Any, kwargs: Any, tensors: set[int]) -> bool:
        found: list[bool] = []
        fx.node.map_aggregate((args, kwargs), lambda item: found.append(id(item) in tensors))
        return any(found)


@contextmanager
def _following_wrapped_products() -> Iterator[None]:
    """Within: functions registered by `fx.wrap` that call an operation of the table are no leaves."""
    table = _symbolic_trace._wrapped_fns_to_patch
    followed = {key: frame for key, frame in table.items() if multiplies(frame.get(key[1]))}
    for key in followed:
        del table[key]
    try:
        yield
    finally:
        table.update(followed)
