"""Stand-ins for values while a model is traced."""

import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import numpy as np
from torch import fx
from torch.fx import _symbolic_trace
from torch.overrides import is_tensor_method_or_property

from saq_fx.errors import TracingError
from saq_fx.operation_names import AUGMENTED


class TrainingMarker(int):
    """Stands for `self.training` of the module at `owner` while tracing; notes where the code asks for its value."""

    owner: str
    asked_at: set[str]
    tracer: Any

    def __new__(cls, value: bool, owner: str) -> "TrainingMarker":
        """A marker of value 0 or 1."""
        marker = super().__new__(cls, value)
        marker.owner, marker.asked_at, marker.tracer = owner, set(), None
        return marker

    @property
    def value(self) -> bool:
        """The mode, without a note."""
        return int.__int__(self) != 0

    def __bool__(self) -> bool:
        if self.tracer is not None:
            self.asked_at.add(self.tracer.current_path)
        return self.value

    __hash__ = int.__hash__


def _asking(name: str) -> Callable[..., Any]:
    return lambda marker, *args: getattr(bool(marker), name)(*args)


for _name in ("int", "index", "float", "eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "str", "format"):
    setattr(TrainingMarker, f"__{_name}__", _asking(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor"):
    setattr(TrainingMarker, f"__{_name}__", _asking(f"__{_name}__"))
    setattr(TrainingMarker, f"__r{_name}__", _asking(f"__r{_name}__"))


def find_proxy(args: Iterable[Any], kwargs: Mapping[str, Any]) -> fx.Proxy | None:
    """A proxy among nested arguments; the arguments themselves, which most often are one, first."""
    direct = next((each for each in args if issubclass(type(each), fx.Proxy)), None)
    return _symbolic_trace._find_proxy(args, kwargs) if direct is None else direct


class GuardedProxy(fx.Proxy):
    """A proxy that takes concrete values from the example inputs where Python insists on them."""

    tracer: Any

    def __getattr__(self, name: str) -> "GuardedAttribute":
        return GuardedAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN_ATTRIBUTES and not name.startswith("__"):
            raise TracingError(f"forward sets the attribute {name} of a tensor, which no graph does")
        super().__setattr__(name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        return int(self.tracer.concrete(self, "len"))

    def __index__(self) -> int:
        return int(self.tracer.index(self, sys._getframe(1)))

    def __hash__(self) -> int:
        """Of a setting that a set or a dictionary is asked for, of its value; sizes are new keys to any cache."""
        return int(self.tracer.hash_of(self))

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        """Records a call; that torch asked for its sizes as integers before has decided nothing."""
        args, kwargs = args or (), kwargs or {}
        proxy: Any = find_proxy(args, kwargs)
        if proxy is not None:
            proxy.tracer.drop_guards_of_call(sys._getframe(1))
        if proxy is None or type(orig_method) not in _FUNCTIONS:
            return super().__torch_function__(orig_method, types, args, kwargs)
        # As in torch, which goes through all arguments once more.
        tracer, name = proxy.tracer, orig_method.__name__
        if _is_method(orig_method):
            return tracer.create_proxy("call_method", name, args, kwargs)
        return tracer.create_proxy("call_function", orig_method, args, kwargs, tracer.graph._target_to_str(name))

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __round__(self, *digits: int) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __array_ufunc__(self, function: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """`np.sqrt` of a size is recorded; numpy's numbers leave `2 * tensor` to the tensor."""
        binary = _OPERATORS.get(function) if method == "__call__" and not kwargs else None
        if binary is not None:
            return self.tracer.create_proxy("call_function", binary, args, {})
        return self.tracer.numpy_call(function if method == "__call__" else getattr(function, method), args, kwargs)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """`np.prod` of a shape is recorded."""
        return self.tracer.numpy_call(function, args, kwargs)

    def __int__(self) -> int:
        return int(self.tracer.concrete(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self, "float"))


class GuardedAttribute(fx.proxy.Attribute, GuardedProxy):
    """An attribute of a value, or a method of it that is about to be called."""


_OPERATORS = {
    np.multiply: operator.mul,
    np.add: operator.add,
    np.subtract: operator.sub,
    np.true_divide: operator.truediv,
    np.floor_divide: operator.floordiv,
    np.power: operator.pow,
    np.remainder: operator.mod,
}
_is_method = lru_cache(4096)(is_tensor_method_or_property)
_FUNCTIONS = (BuiltinFunctionType, FunctionType, MethodDescriptorType)
_OWN_ATTRIBUTES = ("tracer", "node", "root", "attr", "_node")


def _augmented(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], Any]:
    """`x += y` changes a tensor in place, and so all that shares memory with it; numbers are replaced."""
    return lambda value, other: value.tracer.create_proxy("call_function", function, (value, other), {})


IN_PLACE_OPERATORS = {f"__{name}__" for name in AUGMENTED}
for _name in AUGMENTED:
    setattr(GuardedProxy, f"__{_name}__", _augmented(getattr(operator, _name)))
