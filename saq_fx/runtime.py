"""What a captured graph calls besides the model's own operations: guards, objects, functions and scopes."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from saq_fx.errors import TracingError


def require_default(value: Any, default: Any, name: str) -> None:
    """Rejects a value for an argument that tracing has fixed at its default."""
    if not (value is default or value == default):
        raise TracingError(
            f"argument {name!r} was fixed at its default {default!r} when the model was prepared: pass it in "
            "example_inputs to prepare_saq if it is to vary"
        )


def require_given(value: Any, name: str) -> None:
    """Rejects a call that lacks an argument, which the model has no default for."""
    if value is None:
        raise TracingError(
            f"argument {name!r} is None or missing, and was given when the model was prepared: leave it out of "
            "example_inputs to prepare_saq if it is not to be given"
        )


def type_name(value: Any) -> str:
    """What guards call the type of a value."""
    return "Tensor" if isinstance(value, Tensor) else type(value).__name__.removeprefix("immutable_")  # fx's lists


CONCRETE: dict[str, Callable[[Any], Any]] = {
    "bool": bool,
    "len": len,
    "int": int,
    "float": float,
    "type": type_name,
    "types": lambda items: [type_name(item) for item in items],
    "nones": lambda items: [index for index, item in enumerate(items) if item is None],
    "items": list,
}
"""What Python may ask of a symbolic value, by the names that guards have for it."""


def require_same_path(value: Any, kind: str, expected: Any, place: str) -> None:
    """Rejects inputs for which the model would take another path than it took on the example inputs."""
    actual = CONCRETE[kind](value)
    if actual != expected:
        raise TracingError(
            f"these inputs take another path through the model than the example inputs did, at {place}: {kind} is "
            f"{actual}, it was {expected}. Prepare the model with example inputs of this kind"
        )


def class_name(cls: type) -> str:
    """Where to find a class again."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(name: str) -> Any:
    """The class of a `class_name`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def is_importable(cls: type) -> bool:
    """Whether `find_class` finds a class by its name: not one that a function has made."""
    try:
        return find_class(class_name(cls)) is cls
    except (ImportError, AttributeError):
        return False


def build_object(name: str, attributes: Mapping[str, Any]) -> Any:
    """An object of the class of that name with these attributes."""
    cls = find_class(name)
    built = cls.__new__(cls)
    built.__dict__.update(attributes)
    return built


def apply_function(name: str, *args: Any, **kwargs: Any) -> Any:
    """What the `torch.autograd.Function` of that name makes of its arguments, with its own backward."""
    return find_class(name).apply(*args, **kwargs)


@has_side_effect
def switch_autocast(device: str, enabled: bool) -> bool:
    """Turns autocast off, or on as it was, and says whether it was on.

    That is all that a scope of `torch.autocast(enabled=False)` does. An error on the way leaves it off only up to the
    end of the caller's own scope.
    """
    was_enabled = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, enabled)
    return was_enabled
