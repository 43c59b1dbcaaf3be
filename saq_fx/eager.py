"""Models, and modules in them, that run as Python code: their own forward, and what is run in its place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import nn

ROUTED = "_routed"
"""The attribute of a module that runs its code in the place of `forward` (see `saq_fx.products`)."""

_FORWARD = "_own_forward"


@contextmanager
def without_fused_layers() -> Iterator[None]:
    """Within: `nn.TransformerEncoderLayer` calls its children instead of one fused operation on their parameters."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def run_eagerly(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    more_args: Sequence[Any] = (),
    more_kwargs: Mapping[str, Any] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Runs a model's forward as Python does: the one operation of a graph that stands for an untraceable model.

    Arguments at their `defaults` are not passed: a decorator of forward may set what is not passed.
    """
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if name not in defaults or type(value) is not type(defaults[name]) or value != defaults[name]
    }
    forward = vars(model).get(ROUTED) or own_forward(model)
    with without_fused_layers():
        return forward(model, *args, *more_args, **kwargs, **more_kwargs)


def own_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward of a model's code: of its class, if it was not given another (see `keep_forward`)."""
    forward: Callable[..., Any] = vars(model).get(_FORWARD, type(model).forward)
    return forward


def keep_forward(holder: nn.Module, model: nn.Module) -> None:
    """Notes the forward that a model was given itself where a graph or routed calls take its place in `holder`."""
    forward = vars(holder).pop("forward", None)
    if forward is not None:
        is_method = getattr(forward, "__self__", None) is model
        vars(holder)[_FORWARD] = forward.__func__ if is_method else partial(_without_object, forward)


def restore_forward(model: nn.Module) -> None:
    """Undoes `keep_forward`."""
    vars(model).pop("forward", None)
    if _FORWARD in vars(model):
        vars(model)["forward"] = MethodType(vars(model).pop(_FORWARD), model)


def _without_object(forward: Callable[..., Any], model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)
