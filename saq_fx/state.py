"""State that a model keeps in attributes from one call to the next, which no graph has."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from saq_fx.errors import TracingError
from saq_fx.graph import SaqGraphModule
from saq_fx.held import (
    GENERATORS,
    MISSING,
    Snapshot,
    forward_hooks,
    has_forward_hooks,
    is_plain,
    kept_by,
    modules_in,
    objects_in,
    proxies_in,
)
from saq_fx.operation_names import is_in_place
from saq_fx.quantizers import Quantizer
from saq_fx.sharpness import Buffers, HostRandom


@dataclass(frozen=True, eq=False)
class Held:
    """An object, no module, that modules know by an attribute; its own equality and hash may be anything."""

    value: Any


Kept = dict[tuple[nn.Module | Held, str], Any]
"""(owner, name of an attribute or buffer that forward changes) -> what it was."""


class Attributes:
    """Attributes and buffers of a model's modules, to be had back where forward put symbolic values (caches).

    And attributes of other objects that modules know.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = {module: tuple(map(Snapshot, _tables(module))) for module in modules_in(model)}
        held = (each for attributes, *_ in self._saved.values() for each in attributes.values.values())
        self._objects = {Held(each): Snapshot(vars(each)) for each in objects_in(held)}

    def of_part(self, part: nn.Module) -> "Attributes":
        """Those of a module in the model as they are now, without other objects; what has not changed is shared."""
        own = object.__new__(Attributes)
        own._objects, own._saved = {}, {}
        for module in modules_in(part):
            tables, known = _tables(module), self._saved.get(module, ())
            is_known = bool(known) and all(map(Snapshot.is_current, known, tables))
            own._saved[module] = known if is_known else tuple(map(Snapshot, tables))
        return own

    def restore(self, model: nn.Module) -> None:
        """Takes symbolic values, and numbers that forward changed, out of the attributes of a model or a part of it."""
        for module in modules_in(model):
            for held, snapshot in zip(_tables(module), self._saved.get(module, ()), strict=False):
                snapshot.put_back(held, snapshot.moved(held))

    def restore_all(self, model: nn.Module) -> None:
        """The same of the whole model and of the other objects, which its parts may share."""
        self.restore(model)
        for each, snapshot in self._objects.items():
            snapshot.put_back(vars(each.value), snapshot.moved(vars(each.value)))

    def reject_given(self, leaf: nn.Module, path: str) -> None:
        """Raises TracingError if forward has set attributes that the Python code of a leaf of the graph may read."""
        modules = set(leaf.modules())
        values = (value for each in modules for value in Snapshot(vars(each)).values.values())
        known = {id(each) for each in objects_in(values)}
        owners: list[tuple[nn.Module | Held, Snapshot]] = [(each, self._saved[each][0]) for each in modules]
        owners += [(each, attributes) for each, attributes in self._objects.items() if id(each.value) in known]
        for owner, attributes in owners:
            for name in attributes.moved(_attributes_of(owner)):
                raise TracingError(f"forward sets {name} for module {path!r}, which stays Python code")

    def kept(self, is_data: Callable[[fx.Node, bool], bool]) -> Kept:
        """What forward has changed such that a later call may know, as a memory or a counter but no cache of sizes."""
        found: Kept = {}
        owners: dict[nn.Module | Held, Snapshot] = {each: attributes for each, (attributes, *_) in self._saved.items()}
        for owner, attributes in (owners | self._objects).items():
            held = _attributes_of(owner)
            for name in attributes.moved(held):
                if _is_state(held[name], is_data):
                    found[owner, name] = attributes.values.get(name, MISSING)
        for module, (_, buffers, parameters) in self._saved.items():
            for name in parameters.moved(module._parameters):
                raise TracingError(f"{type(module).__name__} is given another parameter {name}, which no graph does")
            for name, buffer in module._buffers.items():
                if (
                    isinstance(buffer, fx.Proxy)
                    and is_data(buffer.node, True)
                    and not _changes_in_place(buffer.node, name)
                ):
                    found[module, name] = buffers.values.get(name, MISSING)
        return found


class Forgotten:
    """Stands for an attribute that forward writes: reading it first is reading what an earlier call has left."""

    def __init__(self, owner: nn.Module | Held, name: str) -> None:
        kind = type(owner.value if isinstance(owner, Held) else owner).__name__
        vars(self)["message"] = f"{kind}.{name} is kept from one call to the next, which no graph does"

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
    for owner, name in kept:
        _holder(owner, name)[name] = Forgotten(owner, name)
    try:
        yield
    finally:
        for (owner, name), before in kept.items():
            if before is MISSING:
                _holder(owner, name).pop(name, None)
            else:
                _holder(owner, name)[name] = before


def reject_written_buffers(kept: Iterable[tuple[nn.Module | Held, str]]) -> None:
    """Raises TracingError if forward has put another tensor in the place of one that checkpoints hold."""
    for module, name in kept:
        if isinstance(module, Held) or name not in module._buffers or name in module._non_persistent_buffers_set:
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

    Also what their hooks keep, and whether the levels of quantizers have been set.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = Buffers(model)
        attributes = (vars(each) for each in modules_in(model) if runs_python(each))
        of_modules: list[tuple[MutableMapping[str, Any], Snapshot]] = [(each, Snapshot(each)) for each in attributes]
        objects = objects_in(value for _, each in of_modules for value in each.values.values())
        others: list[MutableMapping[str, Any]] = [vars(each) for each in objects]
        others += [each for hook in forward_hooks(model) for each in kept_by(hook)]
        self._attributes = [*of_modules, *((each, Snapshot(each)) for each in others)]
        held = [value for _, each in self._attributes for value in each.values.values()]
        tensors = [value for value in held if isinstance(value, Tensor) and value.layout is torch.strided]
        self._tensors = [(tensor, tensor.clone()) for tensor in tensors if 0 not in tensor.stride()]
        self._levels_set = [(each, each.initialized) for each in modules_in(model) if isinstance(each, Quantizer)]

    @torch.no_grad()
    def restore(self) -> None:
        """Makes all of it what it was."""
        self._buffers.restore()
        for tensor, content in self._tensors:
            tensor.data.copy_(content)
        for attributes, snapshot in self._attributes:
            snapshot.restore(attributes)
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
    """Within: the model may run. Afterwards its state, and the generators of Python and numpy, are as before.

    It has the parameters that it had, too: code may put others in their place (codebooks that are moving averages).
    """
    chance, parameters = HostRandom(), [(each._parameters, dict(each._parameters)) for each in modules_in(model)]
    try:
        with preserve_state(model):
            yield
    finally:
        chance.put_back()
        for held, before in parameters:
            held.clear()
            held.update(before)


def runs_python(module: nn.Module) -> bool:
    """Whether forward is code of the model's own, which may keep state in attributes; graphs, and torch's, do not."""
    if isinstance(module, SaqGraphModule):
        return "_python_class" in vars(module)
    return has_forward_hooks(module) or not type(module).__module__.startswith(("saq_fx.", "torch."))


def _attributes_of(owner: nn.Module | Held) -> dict[str, Any]:
    return vars(owner.value if isinstance(owner, Held) else owner)


def _tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    return vars(module), module._buffers, module._parameters


def _holder(owner: nn.Module | Held, name: str) -> dict[str, Any]:
    return owner._buffers if isinstance(owner, nn.Module) and name in owner._buffers else _attributes_of(owner)


def _is_state(value: Any, is_data: Callable[[fx.Node, bool], bool]) -> bool:
    """Whether what forward has put there is more than what the sizes of its inputs, or nothing at all, decide."""
    proxies = list(proxies_in(value))
    if proxies:
        # A dictionary of what parameters give is a cache, which a graph computes anew.
        return any(is_data(proxy.node, not isinstance(value, dict)) for proxy in proxies)
    return is_plain(value) or type(value) in GENERATORS


def _changes_in_place(node: fx.Node, name: str) -> bool:
    """Whether a node is the buffer of that name still, changed in place (`self.count += 1`)."""
    while is_in_place(node):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr" and str(node.target).rpartition(".")[2] == name
