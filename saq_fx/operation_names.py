"""What an operation is called, whichever way it is called: `torch.add`, `+`, `x.add_` and `aten.add` are all "add"."""

import builtins
import inspect
from functools import lru_cache
from typing import Any

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

_OWN = ("torch", "_operator", "saq_fx")
_NAMESPACES = ("linalg_", "fft_", "special_", "_sparse_", "sparse_")
AUGMENTED = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
    "irshift",
}  # fmt: skip
_WRITES_NO_VALUES = {"requires_grad_", "detach_", "share_memory_"}


def operation_name(node: fx.Node) -> str:
    """The name of the operation of torch or Python that a node calls, "" for anything else.

    Without the marks of its in-place form, and without its namespace: `add_` and `iadd` are "add".
    """
    return _described(node.target)[0] if node.op in ("call_function", "call_method") else ""


def is_in_place(node: fx.Node) -> bool:
    """Whether a node calls the form of an operation that writes to its first argument."""
    return _described(node.target)[1] if node.op in ("call_function", "call_method") else False


def writes_first(node: fx.Node) -> bool:
    """Whether a node writes to its first argument, by the form of the operation or by `inplace=True`."""
    return is_in_place(node) or _asks_for_in_place(node)


def source_of(node: fx.Node) -> fx.Node:
    """The node that a node leads back to by first arguments: what it is a view of, or writes to, if it does either."""
    while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def function_name(function: Any) -> str:
    """The same of a function or a method."""
    return _described(function)[0]


@lru_cache(4096)
def _described(target: Any) -> tuple[str, bool]:
    name = _plain_name(target)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    for namespace in _NAMESPACES:
        name = name.removeprefix(namespace)
    if name in ("setitem", "delitem"):
        return name, True
    if name in AUGMENTED:
        return name[1:], True
    return name.removesuffix("_"), name.endswith("_") and name not in _WRITES_NO_VALUES


def _plain_name(target: Any) -> str:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload | OpOverloadPacket):
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        return str(packet._qualified_op_name.rpartition("::")[2])
    # Methods of tensors have no module.
    module = getattr(target, "__module__", None) or "torch"
    known = module.split(".")[0] in _OWN or module == builtins.__name__
    return str(getattr(target, "__name__", "")) if known else ""


def _asks_for_in_place(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    position = _position_of_in_place(node.target)
    return position is not None and position < len(node.args) and node.args[position] is not False


@lru_cache(4096)
def _position_of_in_place(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # torch's built-in functions; none has such an argument
        return None
    return names.index("inplace") if "inplace" in names else None
