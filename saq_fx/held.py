"""What modules, objects and hooks hold from one call to the next: to notice what a call has changed, and to undo it."""

import operator
import pickle
import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

MISSING: Any = object()
"""Stands for what an attribute was before it was first set."""

STRUCTURE = frozenset(vars(nn.Module()))
"""The attributes of a module that hold parameters, other modules and hooks."""

_PLAIN = (bool, int, float, str, type(None))
PLAIN_TYPES = frozenset(_PLAIN)
_CONTAINERS = {list, dict, set, deque, OrderedDict, defaultdict}
GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
"""Generators of random numbers: what gives the state of one, and what sets it."""

_LIBRARIES = ("torch", "saq_fx", "numpy")
_NO_STATE = (type, types.ModuleType, types.FunctionType, types.MethodType, nn.Module, Tensor, fx.Proxy)


class Snapshot:
    """What attributes, buffers or variables are now, with all that the containers among them hold."""

    def __init__(self, held: Mapping[str, Any]) -> None:
        self._names, self._all = list(held), list(held.values())
        self.values = {name: value for name, value in held.items() if name not in STRUCTURE}
        self._contents: dict[str, list[tuple[Any, Any]]] = {}
        mutable = [(name, value) for name, value in self.values.items() if type(value) not in PLAIN_TYPES]
        self._drawn_from = {
            name: GENERATORS[type(value)][0](value) for name, value in mutable if type(value) in GENERATORS
        }
        for name, value in mutable:
            if type(value) in _CONTAINERS or (type(value) is tuple and not is_immutable(value)):
                contents = [(each, each.copy()) for each in _walk([value]) if type(each) in _CONTAINERS]
                if contents:
                    self._contents[name] = contents

    def moved(self, held: Mapping[str, Any]) -> list[str]:
        """The names under which there is a symbolic value now, another number or other contents."""
        if self.is_current(held):
            return []
        items = ((name, value) for name, value in held.items() if name not in STRUCTURE)
        return [name for name, value in items if self._is_moved(name, value)]

    def is_current(self, held: Mapping[str, Any]) -> bool:
        """Whether all of them are what they were; False if a container or a generator is among them."""
        is_comparable = not (self._contents or self._drawn_from) and list(held) == self._names
        return is_comparable and all(map(operator.is_, held.values(), self._all))

    def put_back(self, held: MutableMapping[str, Any], names: Iterable[str]) -> None:
        """Makes these what they were."""
        for name in names:
            if name not in self.values:
                held.pop(name, None)
                continue
            if held.get(name, MISSING) is not self.values[name]:
                held[name] = self.values[name]
            if name in self._drawn_from:
                GENERATORS[type(held[name])][1](held[name], self._drawn_from[name])
            for container, before in self._contents.get(name, ()):
                if not is_same(container, before):
                    container.clear()
                    (container.extend if isinstance(container, list | deque) else container.update)(before)

    def restore(self, held: MutableMapping[str, Any]) -> None:
        """Makes all of them what they were."""
        self.put_back(held, {*held, *self.values}.difference(STRUCTURE))

    def _is_moved(self, name: str, value: Any) -> bool:
        before, contents = self.values.get(name, MISSING), self._contents.get(name, ())
        if any(not is_same(*each) for each in contents):
            return True
        if value is before:
            if name not in self._drawn_from:
                return False
            drawn = GENERATORS[type(value)][0](value)  # arrays or tensors, perhaps in containers
            return pickle.dumps(drawn) != pickle.dumps(self._drawn_from[name])
        if _is(value, _PLAIN):
            return type(value) is not type(before) or value != before
        is_other = type(value) in _CONTAINERS and not is_same(value, before)
        return is_other or any(True for _ in proxies_in(value))


def is_same(value: Any, before: Any) -> bool:
    """Whether nothing was put in the place of what was there, nor into it."""
    if value is before:
        return True
    if type(value) is not type(before) or type(value) not in _CONTAINERS or len(value) != len(before):
        return False
    if isinstance(value, set):
        return {id(each) for each in value} == {id(each) for each in before}
    if isinstance(value, dict):
        return all(key in before and item is before[key] for key, item in value.items())
    return all(item is other for item, other in zip(value, before, strict=True))


def is_immutable(value: Any) -> bool:
    """Whether a value is a number, a text or None, or a tuple of such."""
    return type(value) in PLAIN_TYPES or (type(value) is tuple and PLAIN_TYPES.issuperset(map(type, value)))


def is_plain(value: Any) -> bool:
    """Whether a value, or all that is in a container, are numbers, texts and None."""
    return all(_is(each, _PLAIN) or _is_nested(each) for each in _walk([value]))


def _is(value: Any, kinds: Any) -> bool:
    """`isinstance`, which while a model is traced asks for the type of what a symbolic value stands for."""
    return issubclass(type(value), kinds)


def proxies_in(value: Any) -> Iterator[fx.Proxy]:
    """The symbolic values in a value and in its containers."""
    return (each for each in _walk([value]) if _is(each, fx.Proxy))


def containers_in(values: Iterable[Any]) -> list[Any]:
    """The lists and dictionaries among values and in their containers, each once."""
    return [each for each in _walk(values) if type(each) in _CONTAINERS and _is(each, (list, dict))]


def replace_references(module: nn.Module, others: Mapping[Any, nn.Module]) -> None:
    """Puts others in the place of modules that attributes of a module, and containers in them, refer to."""
    attributes = {name: value for name, value in vars(module).items() if name not in STRUCTURE}
    for held in (vars(module), *containers_in(attributes.values())):
        for name, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
            if isinstance(value, nn.Module) and value in others:
                held[name] = others[value]
            elif type(value) is tuple and any(isinstance(each, nn.Module) for each in value):
                held[name] = tuple([others.get(each, each) if isinstance(each, nn.Module) else each for each in value])


def holds_modules(value: Any, into_objects: bool = False) -> bool:
    """Whether a value is a module, or has one in its containers."""
    return any(_is(each, nn.Module) for each in _walk([value], into_objects))


def objects_in(values: Iterable[Any]) -> list[Any]:
    """The objects with attributes of their own that are among values, in their containers and in one another."""
    values = [each for each in values if not is_immutable(each)]
    return [each for each in _walk(values, into_objects=True) if _is_object(each)]


def _walk(values: Iterable[Any], into_objects: bool = False) -> Iterator[Any]:
    """Values, and the items of containers, each of these once."""
    pending, seen = list(values), set[int]()
    while pending:
        value = pending.pop()
        is_object = into_objects and _is_object(value)
        if is_object or _is_nested(value):
            if id(value) in seen:
                continue
            seen.add(id(value))
            held = vars(value) if is_object else value
            pending.extend(held.values() if _is(held, dict) else held)
        yield value


def _is_nested(value: Any) -> bool:
    return _is(value, (list, tuple, dict, set, deque))


def _is_object(value: Any) -> bool:
    """Whether a value may keep state in attributes; objects of Python's library and of torch keep their own."""
    if _is(value, (*_PLAIN, *_NO_STATE)) or _is_nested(value) or not hasattr(value, "__dict__"):
        return False
    owner = type(value).__module__.partition(".")[0]
    return _is(value, types.SimpleNamespace) or not (owner in _LIBRARIES or owner in sys.stdlib_module_names)


class _Variables(MutableMapping[str, Any]):
    """The variables from outside that a function reads or sets."""

    def __init__(self, function: types.FunctionType) -> None:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._cells = {name: cell for name, cell in cells if _is_filled(cell)}
        self._globals = function.__globals__
        self._names = [*self._cells, *(name for name in function.__code__.co_names if name in self._globals)]

    def __getitem__(self, name: str) -> Any:
        return self._cells[name].cell_contents if name in self._cells else self._globals[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self._cells:
            self._cells[name].cell_contents = value
        else:
            self._globals[name] = value

    def __delitem__(self, name: str) -> None:
        del self._globals[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def modules_in(model: nn.Module) -> list[nn.Module]:
    """As `list(model.modules())`, which takes several times as long: it makes up the path of each."""
    found: dict[nn.Module, None] = {}
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if module is not None and module not in found:
            found[module] = None
            if module._modules:
                pending.extend(reversed(module._modules.values()))
    return list(found)


def forward_hooks(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """The hooks that run before or after the forward of any of the model's modules."""
    for module in modules_in(model):
        if has_forward_hooks(module):
            yield from (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run at every call of the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def function_of(hook: Callable[..., Any]) -> Any:
    """The function that a hook runs: of a method, and of one with some arguments given."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__func__", hook)


def kept_by(hook: Callable[..., Any]) -> list[MutableMapping[str, Any]]:
    """All that a hook can keep values in: variables from outside, arguments given, and objects among them."""
    found: list[MutableMapping[str, Any]] = []
    while isinstance(hook, partial):
        found.append({"args": hook.args, "kwargs": hook.keywords})
        hook = hook.func
    if isinstance(function_of(hook), types.FunctionType):
        found.append(_Variables(function_of(hook)))
    held = [getattr(hook, "__self__", hook), *(value for each in found for value in each.values())]
    return [*found, *(vars(each) for each in objects_in(held))]


def shared_with_hooks(model: nn.Module) -> Iterator[Any]:
    """Containers and objects that hooks know, and so share with all copies of the model."""
    for hook in forward_hooks(model):
        owner = getattr(hook, "__self__", hook)
        held = [value for each in kept_by(hook) for value in each.values()]
        for value in _walk([owner, *held]):
            if (type(value) in _CONTAINERS or _is_object(value)) and not holds_modules(value, into_objects=True):
                yield value
