"""One run of a model whose own Python code stays: which modules it calls, with what, and what flows between them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from saq_fx.annotation import join_path
from saq_fx.held import holds_modules
from saq_fx.nested import cloned, tensors_in
from saq_fx.operators import arithmetic_called
from saq_fx.products import OPENED_ATTENTION, Product, product_called

INPUT = ""
"""The origin of what is the network's input still, at most rearranged or rescaled without parameters."""

_WEIGHTS = "weights"
"""The origin of what parameters were used for."""


@dataclass
class Calls:
    """How a module was called from Python code: inputs (one of each kind), where from, and whether under `vmap`.

    Also by device the type that autocast had when it was called first.
    """

    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    autocast: dict[str, torch.dtype] = field(default_factory=dict)
    kinds: list[Any] = field(default_factory=list)
    origins: set[nn.Module | Product | str] = field(default_factory=set)
    is_transformed: bool = False

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Within: autocast is as it was."""
        with ExitStack() as scopes:
            for device, dtype in self.autocast.items():
                scopes.enter_context(torch.autocast(device, dtype))
            yield


class CallRecorder(TorchFunctionMode):
    """While entered, notes the calls that the code of `python` modules makes of other modules and of the table.

    `calls` are the modules and the products called; `reaching` are those of these modules that call others which are
    not in them, or are given others as arguments; `is_reaching` is whether `python` modules themselves do; `operations`
    the names of other operations with multiply-adds that such code runs itself, each with the module whose code it is.
    The origins of a call are what was called before and its inputs were computed from, and `INPUT`. Once `is_open` is
    False, of modules only more inputs of the calls found so far are noted.

    Args:
        model: what is going to run.
        python: modules of it whose forward stays Python code.
    """

    def __init__(self, model: nn.Module, python: Iterable[nn.Module]) -> None:
        super().__init__()
        self.calls: dict[nn.Module | Product, Calls] = {}
        self.reaching: set[nn.Module] = set()
        self.is_reaching = False
        self.operations: dict[str, nn.Module] = {}
        self.is_open = True
        self._model, self._python = model, set(python)
        self._paths = {module: path for path, module in model.named_modules()}
        self._stack: list[nn.Module] = []
        self._members: dict[nn.Module, set[nn.Module]] = {}
        self._origins: Any = WeakIdKeyDictionary()

    @contextmanager
    def following(self, inputs: Any) -> Iterator[None]:
        """Within: a run of the model on these inputs is recorded."""
        for tensor in tensors_in(inputs):
            self._origins[tensor] = {INPUT}
        handles = []
        for module in self._paths:
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _is_called_from_python(self) -> bool:
        """Whether the code that runs now belongs to one of the Python modules."""
        return bool(self._stack) and self._stack[-1] in self._python

    def _called_from_python(self) -> nn.Module | None:
        """The module that Python code has called and that has not returned yet."""
        called = None
        for module in reversed(self._stack):
            if module in self._python:
                return called
            called = module
        return None

    def _inside(self, module: nn.Module) -> set[nn.Module]:
        if module not in self._members:
            self._members[module] = set(module.modules())
        return self._members[module]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called = self._called_from_python()
        if called is not None and module not in self._inside(called):
            self.reaching.add(called)
        if self._is_called_from_python() and module not in self._python and (self.is_open or module in self.calls):
            calls = self.calls.setdefault(module, Calls())
            if holds_modules((args, kwargs)):
                self.reaching.add(module)
            self.is_reaching |= not any(module in self._inside(each) for each in self._stack if each in self._python)
            calls.origins.update(*(self._origins.get(tensor, ()) for tensor in tensors_in((args, kwargs))))
            kind = _kind((args, kwargs))
            if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors_in((args, kwargs))):
                calls.is_transformed = True
            elif kind not in calls.kinds:
                if not calls.kinds:
                    calls.autocast = _autocast_of((args, kwargs))
                calls.kinds.append(kind)
                calls.inputs.append(cloned((args, kwargs)))  # what comes next may change them
        self._stack.append(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._stack.pop()
        if self._is_called_from_python() and module not in self._python:
            for tensor in tensors_in(output):
                self._origins[tensor] = {*self._origins.get(tensor, ()), module}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Passes on where values came from; in-place functions pass it to what they change."""
        if func is F.multi_head_attention_forward and self._is_called_from_python():
            with self:
                return OPENED_ATTENTION(*args, **(kwargs or {}))
        operands = tensors_in((args, kwargs or {}))
        origins = set().union(*(self._origins.get(tensor, ()) for tensor in operands))
        has_weights = any(isinstance(tensor, nn.Parameter) for tensor in operands)
        product = self._product(func, args, kwargs or {}, is_constant=not (origins or has_weights))
        output = func(*args, **(kwargs or {}))
        if product is not None:
            self.calls.setdefault(product, Calls()).origins.update(origins)
            origins.add(product)
        if has_weights:
            origins = (origins - {INPUT}) | {_WEIGHTS}
        if origins:
            for tensor in operands[:1] if output is None else tensors_in(output):
                self._origins[tensor] = origins
        return output

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_constant: bool) -> Product | None:
        """What is called if Python code calls a product, but of constants; what else it computes is noted by name."""
        name = arithmetic_called(func) if self._is_called_from_python() else None
        if name is None:
            return None
        product = None if is_constant else product_called(func, args, kwargs, self._stack[-1])
        if product is None and self.is_open:
            self.operations[join_path(self._paths[self._stack[-1]], name)] = self._stack[-1]
        return product


def _autocast_of(inputs: Any) -> dict[str, torch.dtype]:
    """The type to which autocast lowers what runs on the inputs' device, by device; empty where it is off."""
    device = next((tensor.device.type for tensor in tensors_in(inputs)), "cpu")
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on "meta"
    return {device: torch.get_autocast_dtype(device)} if is_on else {}


def _kind(value: Any) -> Any:
    """What guards of a graph may ask of arguments: shapes and types of tensors, and all that is plain."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, list | tuple):
        return [_kind(item) for item in value]
    if isinstance(value, dict):
        return {name: _kind(item) for name, item in value.items()}
    return value if isinstance(value, bool | int | float | str | None) else type(value)
