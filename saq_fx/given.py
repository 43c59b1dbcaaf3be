"""Containers that a model is given, while it is traced: what is in them is symbolic, what is None is None.

A symbolic value cannot answer `is None`, nor be a key. So dictionaries, and tuples, lists and dataclasses where some
item is None, are what they are, made of symbolic items; guards reject other keys and another None, where code asks.
"""

import copy
import dataclasses
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from saq_fx.errors import TracingError
from saq_fx.runtime import type_name


def given(tracer: Any, proxy: Any, example: Any) -> Any:
    """What stands for an input, or for an item of one, whose value on the example inputs is `example`."""
    if example is None:
        tracer.guard(proxy.node, "type", "NoneType")
        return None
    if type(example) is dict and all(type(key) is str for key in example):
        return GivenDict(tracer, proxy, example)
    if isinstance(example, tuple | list):
        if not any(map(_is_opened, example)):
            tracer.guard(proxy.node, "nones", [])
            return proxy
        tracer.guard(proxy.node, "types", [type_name(each) for each in example])
        items = [given(tracer, operator.getitem(proxy, index), each) for index, each in enumerate(example)]
        return type(example)._make(items) if hasattr(example, "_make") else type(example)(items)
    return _dataclass(tracer, proxy, example) if _is_opened(example) else proxy


def _is_opened(item: Any) -> bool:
    return (
        item is None
        or type(item) is dict
        or (dataclasses.is_dataclass(item) and not isinstance(item, dict | type))
        or (isinstance(item, tuple | list) and any(map(_is_opened, item)))
    )


def _item(tracer: Any, item: Any, example: Any) -> Any:
    """An item that another input may have, or not."""
    if isinstance(example, Tensor):
        tracer.guard(item.node, "type", "Tensor")
    return given(tracer, item, example)


def _dataclass(tracer: Any, proxy: Any, example: Any) -> Any:
    made = copy.copy(example)
    for field in dataclasses.fields(example):
        item = _item(tracer, getattr(proxy, field.name), getattr(example, field.name))
        object.__setattr__(made, field.name, item)
    return made


class GivenDict(dict[str, Any]):
    """A dictionary that a model is given; what code asks of its keys is guarded."""

    def __init__(self, tracer: Any, proxy: Any, example: dict[str, Any]) -> None:
        super().__init__(example)
        self._tracer, self._proxy, self._example = tracer, proxy, example
        self._items: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._items:
            self._items[key] = _item(self._tracer, operator.getitem(self._proxy, key), self._example[key])
        return self._items[key]

    def __contains__(self, key: object) -> bool:
        is_in = key in self._example
        asked = self._tracer.create_proxy("call_function", operator.contains, (self._proxy, key), {})
        self._tracer.guard(asked.node, "bool", is_in)
        return is_in

    def get(self, key: str, default: Any = None) -> Any:
        """The item at a key."""
        return self[key] if key in self else default  # noqa: SIM401

    def __iter__(self) -> Iterator[str]:
        keys = self._tracer.create_proxy("call_function", list, (self._proxy,), {})
        self._tracer.guard(keys.node, "items", list(self._example))
        return iter(self._example)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def keys(self) -> Any:
        """Its keys, guarded."""
        return dict.fromkeys(self).keys()

    def values(self) -> Any:
        """Its items, guarded."""
        return {key: self[key] for key in self}.values()

    def items(self) -> Any:
        """Its keys and items, guarded."""
        return {key: self[key] for key in self}.items()

    def copy(self) -> dict[str, Any]:
        """A dictionary of its own."""
        return {key: self[key] for key in self}

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TracingError("forward changes a dictionary that it is given, which no graph does")

    __setitem__ = __delitem__ = __ior__ = pop = popitem = clear = update = setdefault = _refuse
