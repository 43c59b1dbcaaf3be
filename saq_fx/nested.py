"""Nested arguments and outputs: tensors in tuples, lists, dictionaries and named tuples of any kind."""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [each for item in value for each in tensors_in(item)] if isinstance(value, list | tuple) else []


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A nested value with all its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(function, item) for item in value]
        # Some named tuples (PackedSequence) take their fields in another way when they are made by name.
        return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    if isinstance(value, dict):
        mapped = copy.copy(value)
        for name, item in value.items():
            mapped[name] = map_tensors(function, item)
        return mapped
    return value


def cloned(value: Any) -> Any:
    """A nested value with copies of its tensors; a tensor that it holds twice is one copy."""
    copies: dict[int, Tensor] = {}

    def clone(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return map_tensors(clone, value)
