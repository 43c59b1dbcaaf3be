"""What is changed in torch while a model is traced, and only then."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx
from torch.fx import _symbolic_trace
from torch.utils import checkpoint

from saq_fx.bytecode import multiplies
from saq_fx.errors import TracingError
from saq_fx.graph import without_fused_layers

_FACTORIES = ("arange", "eye", "finfo", "iinfo", "linspace", "tensor")
# What is random must be drawn anew in each run, and what is filled in place must be made anew.
_ALWAYS_RECORDED = ("empty", "full", "normal", "ones", "rand", "randint", "randn", "randperm", "zeros")


@contextmanager
def patched(tracer: fx.Tracer) -> Iterator[None]:
    """Within: all of the below, for nodes of this tracer's graph."""
    with _following_wrapped_products(), _recording_factories(tracer), _rejecting_checkpoints(), without_fused_layers():
        yield


@contextmanager
def _recording_factories(tracer: fx.Tracer) -> Iterator[None]:
    """Within: functions that make tensors are recorded, those without effects only where a size is symbolic.

    A graph cannot hold the scope of an autocast; it runs under the caller's. Nor can it hold a checkpoint, whose
    module therefore stays Python code.
    """
    # torch.compile keeps tables of torch's functions from when it is imported, which a model may do: not from here.
    importlib.import_module("torch._dynamo")
    originals = {name: getattr(torch, name) for name in (*_FACTORIES, *_ALWAYS_RECORDED, "autocast")}
    for name in (*_FACTORIES, *_ALWAYS_RECORDED):
        setattr(torch, name, _recorded(originals[name], tracer if name in _ALWAYS_RECORDED else None))
    torch.autocast = lambda *args, **kwargs: nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _recorded(function: Callable[..., Any], always_by: fx.Tracer | None) -> Callable[..., Any]:
    """Becomes a node if any argument is a proxy, or always, in the graph of a tracer."""

    def record(*args: Any, **kwargs: Any) -> Any:
        proxy = _symbolic_trace._find_proxy(args, kwargs)
        tracer: Any = always_by if proxy is None else proxy.tracer
        if tracer is None or tracer.is_evaluating:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return record


@contextmanager
def _rejecting_checkpoints() -> Iterator[None]:
    """Within: checkpointing symbolic values is an error, for a graph would lose it, and with it the memory it saves."""
    original = checkpoint._infer_device_type

    def reject(*args: Any) -> Any:
        if _symbolic_trace._find_proxy(args, {}) is not None:
            raise TracingError("torch.utils.checkpoint runs its function a second time, which no graph does")
        return original(*args)  # type: ignore[no-untyped-call]

    checkpoint._infer_device_type = reject
    try:
        yield
    finally:
        checkpoint._infer_device_type = original


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
