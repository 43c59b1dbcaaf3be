"""Nested arguments and outputs: tensors in tuples, lists, dictionaries and named tuples of any kind."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for item in value for each in tensors_in(item)] if isinstance(value, list | tuple) else []


def map_tensors(
    function: Callable[[Tensor], Any], value: Any, map_object: Callable[[Any], Any] = lambda value: value
) -> Any:
    """A nested value with all its tensors replaced, and objects that hold who knows what by `map_object`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(function, item, map_object) for item in value]
        # Some named tuples (PackedSequence) take their fields in another way when they are made by name.
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(function, item, map_object) for item in value]
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for name, item in value.items():
            mapped[name] = map_tensors(function, item, map_object)
        return mapped
    return map_object(value) if _is_changeable(value) else value


def cloned(value: Any) -> Any:
    """A nested value with copies of its tensors; what it holds twice is one copy.

    Objects that code may change, such as caches, are copied as well, where they can be.
    """
    copies: dict[int, Any] = {}

    def clone(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        copied: Tensor = copies[id(tensor)]
        return copied

    def clone_object(item: Any) -> Any:
        try:
            return copy.deepcopy(item, copies)
        except Exception:  # whatever copying an object of someone else's does
            return item

    return map_tensors(clone, value, clone_object)


def _is_changeable(value: Any) -> bool:
    return hasattr(value, "__dict__") and not (isinstance(value, nn.Module | type) or callable(value))
