"""State that a model keeps in attributes from one call to the next, which no graph has."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule
from saq_fx.operation_names import is_in_place
from saq_fx.quantizers import Quantizer
from saq_fx.sharpness import Buffers, HostRandom

Kept = dict[tuple[nn.Module, str], Any]
"""(module, name of an attribute or buffer that forward changes) -> what it was."""

_MISSING: Any = object()
_STRUCTURE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None))


class Snapshot:
    """What a module's attributes or buffers are now, the contents of lists and dictionaries included."""

    def __init__(self, held: Mapping[str, Any]) -> None:
        self.values = {name: value for name, value in held.items() if name not in _STRUCTURE}
        self.contents = {name: value.copy() for name, value in self.values.items() if type(value) in (list, dict)}

    def before(self, name: str) -> Any:
        """What an attribute was; a list or dictionary as a copy, to compare with."""
        return self.contents.get(name, self.values.get(name, _MISSING))

    def moved(self, held: Mapping[str, Any]) -> list[str]:
        """The names under which forward has put a symbolic value, another number or another list."""
        items = ((name, value) for name, value in held.items() if name not in _STRUCTURE)
        return [name for name, value in items if _is_moved(value, self.before(name))]

    def put_back(self, held: dict[str, Any], names: Iterable[str]) -> None:
        """Makes these attributes what they were."""
        for name in names:
            if name not in self.values:
                held.pop(name, None)
                continue
            held[name] = value = self.values[name]
            if name in self.contents:
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(self.contents[name])

    def restore(self, held: dict[str, Any]) -> None:
        """Makes all attributes what they were."""
        names = {*held, *self.values}.difference(_STRUCTURE)
        self.put_back(held, [name for name in names if not is_same(held.get(name), self.before(name))])


class Attributes:
    """Attributes and buffers of a model's modules, to be had back where forward put symbolic values (caches)."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = {module: (Snapshot(vars(module)), Snapshot(module._buffers)) for module in model.modules()}

    def restore(self, model: nn.Module) -> None:
        """Takes symbolic values, and numbers that forward changed, out of the attributes of a model or a part of it."""
        for module in model.modules():
            for held, snapshot in zip((vars(module), module._buffers), self._saved.get(module, ()), strict=False):
                snapshot.put_back(held, snapshot.moved(held))

    def kept(self, is_data: Callable[[fx.Node, bool], bool]) -> Kept:
        """What forward has changed such that a later call may know, as a memory or a counter but no cache of sizes."""
        found: Kept = {}
        for module, (attributes, buffers) in self._saved.items():
            for name in attributes.moved(vars(module)):
                if _is_state(vars(module)[name], is_data):
                    found[module, name] = attributes.values.get(name, _MISSING)
            for name, buffer in module._buffers.items():
                if (
                    isinstance(buffer, fx.Proxy)
                    and is_data(buffer.node, True)
                    and not _changes_in_place(buffer.node, name)
                ):
                    found[module, name] = buffers.values.get(name, _MISSING)
        return found


class Forgotten:
    """Stands for an attribute that forward writes: reading it first is reading what an earlier call has left."""

    def __init__(self, module: nn.Module, name: str) -> None:
        vars(self)["message"] = f"{type(module).__name__}.{name} is kept from one call to the next, which no graph does"

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TracingError(vars(self)["message"])

    __getattr__ = __setattr__ = __delattr__ = __call__ = __getitem__ = __setitem__ = __iter__ = __contains__ = _refuse
    __bool__ = __len__ = __int__ = __float__ = __index__ = __neg__ = __pos__ = __abs__ = __invert__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = __and__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = __rmatmul__ = _refuse
    __or__ = __ror__ = __rand__ = _refuse
    __hash__ = object.__hash__


@contextmanager
def forgotten(kept: Kept) -> Iterator[None]:
    """Within: these attributes can be written, but not be read first."""
    for module, name in kept:
        _holder(module, name)[name] = Forgotten(module, name)
    try:
        yield
    finally:
        for (module, name), before in kept.items():
            if before is _MISSING:
                _holder(module, name).pop(name, None)
            else:
                _holder(module, name)[name] = before


def reject_written_buffers(kept: Iterable[tuple[nn.Module, str]]) -> None:
    """Raises TracingError if forward has put another tensor in the place of one that checkpoints hold."""
    for module, name in kept:
        if name not in module._buffers or name in module._non_persistent_buffers_set:
            continue
        if not isinstance(module._buffers[name], Forgotten):
            raise TracingError(f"{type(module).__name__} assigns its buffer {name}, which no graph does")


@contextmanager
def rejected_chance() -> Iterator[None]:
    """Within: drawing from the generators of Python and numpy is an error at the end, for a graph would do it once."""
    before = HostRandom()
    try:
        yield
    except BaseException:
        before.put_back()
        raise
    if before.put_back():
        raise TracingError("forward draws random numbers from Python's or numpy's generator, which no graph does")


class ForwardState:
    """What forward may change besides parameters, as it is now: buffers, and attributes of modules that run Python.

    Also whether the levels of quantizers have been set.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = Buffers(model)
        self._attributes = {module: Snapshot(vars(module)) for module in model.modules() if _runs_python(module)}
        held = [value for each in self._attributes.values() for value in each.values.values()]
        tensors = [value for value in held if isinstance(value, Tensor) and value.layout is torch.strided]
        self._tensors = [(tensor, tensor.clone()) for tensor in tensors if 0 not in tensor.stride()]
        self._levels_set = [(each, each.initialized) for each in model.modules() if isinstance(each, Quantizer)]

    @torch.no_grad()
    def restore(self) -> None:
        """Makes all of it what it was."""
        self._buffers.restore()
        for tensor, content in self._tensors:
            tensor.data.copy_(content)
        for module, snapshot in self._attributes.items():
            snapshot.restore(vars(module))
        for quantizer, initialized in self._levels_set:
            quantizer.initialized = initialized


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """On leaving, all that forward may change besides parameters is what it was: see `ForwardState`."""
    state = ForwardState(model)
    try:
        yield
    finally:
        state.restore()


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Within: the model may run. Afterwards its state, and the generators of Python and numpy, are as before."""
    chance = HostRandom()
    try:
        with preserve_state(model):
            yield
    finally:
        chance.put_back()


def _runs_python(module: nn.Module) -> bool:
    """Whether forward is code of the model's own, which may keep state in attributes; graphs, and torch's, do not."""
    if isinstance(module, SaqGraphModule):
        return "_python_class" in vars(module)
    return not type(module).__module__.startswith(("saq_fx.", "torch."))


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    return module._buffers if name in module._buffers else vars(module)


def is_same(value: Any, before: Any) -> bool:
    """Whether nothing was put in the place of what was there, nor into it."""
    if value is before:
        return True
    if type(value) is not type(before) or type(value) not in (list, dict) or len(value) != len(before):
        return False
    if isinstance(value, dict):
        return all(key in before and item is before[key] for key, item in value.items())
    return all(item is other for item, other in zip(value, before, strict=True))


def _is_moved(value: Any, before: Any) -> bool:
    if value is before:
        return False
    if isinstance(value, _PLAIN):
        return type(value) is not type(before) or value != before
    return (type(value) in (list, dict) and not is_same(value, before)) or any(True for _ in _proxies(value))


def _is_state(value: Any, is_data: Callable[[fx.Node, bool], bool]) -> bool:
    """Whether what forward has put there is more than what the sizes of its inputs, or nothing at all, decide."""
    proxies = list(_proxies(value))
    if proxies:
        # A dictionary of what parameters give is a cache, which a graph computes anew.
        return any(is_data(proxy.node, not isinstance(value, dict)) for proxy in proxies)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    return all(isinstance(item, _PLAIN) for item in items)


def _proxies(value: Any) -> Iterator[fx.Proxy]:
    if isinstance(value, fx.Proxy):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _proxies(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _proxies(item)


def _changes_in_place(node: fx.Node, name: str) -> bool:
    """Whether a node is the buffer of that name still, changed in place (`self.count += 1`)."""
    while is_in_place(node):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == name
