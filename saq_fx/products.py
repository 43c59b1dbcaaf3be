"""Products that Python code computes itself: each place in the code that does is a part of its own, and quantized.

Code that no graph can follow stays Python. Where it calls an operation of the table, other than through a module that
it calls, that call is routed to a graph of this one operation, which is a child of the module whose code it is. So
every pass finds it as it finds any other part.
"""

import sys
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saq_fx.annotation import update_record
from saq_fx.eager import ROUTED, keep_forward, own_forward, restore_forward
from saq_fx.graph import SaqGraphModule, attribute_at, unused_path
from saq_fx.operators import Operator, operator_called
from saq_fx.places import is_library, line_of_user

CALLER = "caller"
"""The attribute by which the graph of a product finds the module whose code computes it."""

_CALL = nn.Module._call_impl.__code__
# Functions that these run are run again in backward, or for many samples at once, where no call is routed.
_TRANSFORMS = ("utils/checkpoint.py", "autograd/function.py", "/_functorch/")
# What code may hand over in training only, and another value in evaluation.
_PER_CALL = ("dropout_p",)
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype)

OPENED_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""`F.multi_head_attention_forward`, whose operations a mode sees, and not only the call of it."""

Place = tuple[tuple[str, str, int], ...]
_Table = dict[tuple[Place, str], list[tuple[str, Any, Any]]]


@dataclass(frozen=True)
class _Operand:
    """A tensor among the arguments of a product: the parameter at a path, or ("") any tensor, or any number."""

    path: str = ""
    is_number: bool = False


@dataclass(frozen=True)
class Product:
    """One operation at one place in the code of a module, with its arguments: `_Operand`s, and constants.

    `place` has the function and the instruction of each frame between the module's forward and the operation, torch's
    own left out but for those of `torch.nn.functional`.
    """

    module: nn.Module
    place: Place
    operation: Operator
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters among its operands, by path; no biases."""
        operands = (*self.args, *(each for _, each in self.kwargs))
        paths = [each.path for each in operands if isinstance(each, _Operand) and each.path]
        return {path: tensor for path in paths if (tensor := attribute_at(self.module, path)).dim() > 1}

    @property
    def name(self) -> str:
        """What it is called: by the operation, and by the module whose weight it multiplies."""
        owner = next(iter(self.weights()), "").removesuffix("weight").removesuffix("_").removesuffix(".")
        return f"{owner}.{self.operation.name}".removeprefix(".").replace(".", "_")


def product_called(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module
) -> Product | None:
    """What the code of a module calls now, if it is a product that can be routed."""
    entry = operator_called(function)
    if entry is None or entry.name == "embedding" or kwargs.get("out") is not None:
        return None
    place = _place(sys._getframe(1), module)
    if place is None:
        return None
    paths = {id(parameter): path for path, parameter in module.named_parameters()}
    names = (*entry.parameters, *("" for _ in args))
    positional = [_argument(each, paths, name) for each, name in zip(_flat(entry, args), names, strict=False)]
    named = [(name, _argument(each, paths, name)) for name, each in kwargs.items()]
    if any(each is NotImplemented for each in (*positional, *(each for _, each in named))):
        return None
    return Product(module, place, entry, tuple(positional), tuple(named))


def _flat(entry: Operator, args: tuple[Any, ...]) -> tuple[Any, ...]:
    is_nested = entry.name == "einsum" and len(args) == 2 and isinstance(args[1], list | tuple)
    return (args[0], *args[1]) if is_nested else args


def _argument(value: Any, paths: Mapping[int, str], name: str = "") -> Any:
    """An argument as a product has it; NotImplemented for what no graph holds."""
    if name in _PER_CALL:
        return _Operand(is_number=True) if isinstance(value, int | float) else NotImplemented
    if isinstance(value, Tensor):
        return NotImplemented if _is_transformed(value) else _Operand(paths.get(id(value), ""))
    if isinstance(value, list | tuple):
        items = tuple(_argument(each, paths) for each in value)
        is_plain = all(isinstance(each, (*_CONSTANTS, tuple)) for each in items)
        return items if is_plain else NotImplemented
    return value if isinstance(value, _CONSTANTS) else NotImplemented


def _is_transformed(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _place(frame: FrameType | None, module: nn.Module) -> Place | None:
    """Where in the forward of a module the code is; None if that is not what runs now."""
    place: list[tuple[str, str, int]] = []
    while frame is not None:
        code, held = frame.f_code, None
        if code is _CALL:
            held = frame.f_locals["self"]
        elif code is _run.__code__:
            held = frame.f_locals["model"]
        if held is not None:
            return tuple(place) if vars(held) is vars(module) else None
        if not is_library(frame) or code.co_filename == F.__file__:
            place.append((str(frame.f_globals.get("__name__", "")), code.co_qualname, frame.f_lasti))
        elif any(each in code.co_filename for each in _TRANSFORMS):
            return None
        frame = frame.f_back
    return None


def add_products(
    module: nn.Module, holder: nn.Module, products: list[Product], listed: Collection[str]
) -> dict[Product, tuple[str, SaqGraphModule]]:
    """Gives each product a graph, a child of the module, and has calls of the module's code routed to them.

    Args:
        module: its code stays Python.
        holder: what is left of it: the module, or the graph around it.
        products: of this module.
        listed: operations of its code that are known to stay in float.

    Returns:
        Each product's name as a child, and its graph.
    """
    added, table = {}, defaultdict(list)
    for product in products:
        name = unused_path(holder, product.name)
        part = _graph(product, holder)
        holder.add_module(name, part)
        added[product] = name, part
        table[product.place, product.operation.name].append((name, product.args, product.kwargs))
    if holder is module:
        keep_forward(module, module)
    vars(holder)[ROUTED] = Routed(dict(table), frozenset(listed))
    if holder is module:
        vars(module)["forward"] = partial(vars(holder)[ROUTED], module)
    return added


def remove_products(model: nn.Module) -> None:
    """Takes routed calls out of a model again."""
    for module in model.modules():
        routed = vars(module).pop(ROUTED, None)
        if routed is not None:
            restore_forward(module)
            for name in routed.names():
                module._modules.pop(name, None)


def _graph(product: Product, holder: nn.Module) -> SaqGraphModule:
    """A graph of one operation, whose inputs are the tensors that it is called with in order, but for parameters."""
    graph, count = fx.Graph(), 0

    def node(argument: Any) -> Any:
        nonlocal count
        if not isinstance(argument, _Operand):
            return argument
        if argument.path:
            return graph.create_node("get_attr", f"{CALLER}.{argument.path}")
        count += 1
        return graph.placeholder(f"operand_{count}")

    args = tuple(node(each) for each in product.args)
    kwargs = {name: node(each) for name, each in product.kwargs}
    graph.output(graph.call_function(product.operation.function, args, kwargs))
    gm = SaqGraphModule(nn.Module(), fx.Graph(), product.operation.name)
    vars(gm)[CALLER] = holder
    gm.graph = graph
    update_record(gm, tracing="symbolic", is_operation=True)
    return gm


class Routed:
    """Runs the code of a module, with its products routed to their graphs.

    Args:
        table: place and operation -> name of the child and arguments of each product there.
        listed: operations that stay in float without a warning.
    """

    def __init__(self, table: _Table, listed: frozenset[str]) -> None:
        self.table, self.listed = table, listed

    def __call__(self, model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own forward."""
        return _not_compiled()(model, self, args, kwargs)

    def names(self) -> list[str]:
        """Those of all children that are called."""
        return [name for calls in self.table.values() for name, _, _ in calls]


def _run(model: nn.Module, routed: Routed, args: Any, kwargs: Any) -> Any:
    with _Routing(model, routed):
        return own_forward(model)(model, *args, **kwargs)


@cache
def _not_compiled() -> Any:
    """`_run` as it is under `torch.compile`, too, which knows no frames; a function, since the import takes long."""
    return torch.compiler.disable(_run)  # type: ignore[no-untyped-call]


class _Routing(TorchFunctionMode):
    """While entered, operations that the code of a module calls at known places are calls of its children."""

    def __init__(self, module: nn.Module, routed: Routed) -> None:
        super().__init__()
        self._module, self._routed = module, routed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the graph of a product, or the function itself."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return OPENED_ATTENTION(*args, **kwargs)
        entry = operator_called(func)
        place = None if entry is None or entry.name == "embedding" else _place(sys._getframe(1), self._module)
        if entry is None or place is None:
            return func(*args, **kwargs)
        for name, positional, named in self._routed.table.get((place, entry.name), ()):
            inputs = self._inputs((*positional, *(each for _, each in named)), (*_flat(entry, args), *kwargs.values()))
            if inputs is not None and [key for key, _ in named] == list(kwargs):
                return self._module.get_submodule(name)(*inputs)
        if entry.name not in self._routed.listed:
            warnings.warn(
                f"{type(self._module).__name__} calls {entry.name} at {line_of_user()} as it did not on the example "
                "inputs: this call is neither quantized nor counted. Prepare the model with an example that reaches it",
                stacklevel=2,
            )
        return func(*args, **kwargs)

    def _inputs(self, expected: tuple[Any, ...], given: tuple[Any, ...]) -> list[Any] | None:
        """The inputs of a product's graph, None if these are not its arguments."""
        if len(expected) != len(given):
            return None
        inputs: list[Any] = []
        for operand, value in zip(expected, given, strict=True):
            if isinstance(operand, _Operand) and operand.is_number:
                inputs.append(value)
            elif not isinstance(operand, _Operand):
                if _argument(value, {}) != operand:
                    return None
            elif operand.path:
                if attribute_at(self._module, operand.path) is not value:
                    return None
            elif not isinstance(value, Tensor) or _is_transformed(value):
                return None
            else:
                inputs.append(value)
        return inputs
