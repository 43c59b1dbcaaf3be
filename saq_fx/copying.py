"""Deep copies of models: what `copy.deepcopy` makes of them, in a fraction of its time, and hooks of gradients, too."""

import copy
from collections.abc import Callable
from copyreg import dispatch_table
from functools import cache, partial, update_wrapper
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from saq_fx.errors import TracingError
from saq_fx.held import STRUCTURE, holds_modules, replace_references, shared_with_hooks
from saq_fx.parametrized import make_picklable
from saq_fx.scopes import replaced

_Module = TypeVar("_Module", bound=nn.Module)
_Memo = dict[int, Any]

_IMMUTABLE = {bool, int, float, str, type(None)}


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; raises TracingError, saying why and what to do, for a model that has none."""
    original: Callable[[Tensor, _Memo], Tensor] = Tensor.__deepcopy__

    def __deepcopy__(tensor: Tensor, memo: _Memo) -> Tensor:
        # What an earlier call has left, and weights that hooks (weight_norm, spectral_norm, prune) make at each call.
        return original(tensor, memo) if tensor.is_leaf else memo.setdefault(id(tensor), tensor.detach().clone())

    try:
        with replaced(Tensor, __deepcopy__=__deepcopy__):
            own = copy_module(model, {id(each): each for each in shared_with_hooks(model)})
    except Exception as error:
        raise TracingError(
            f"{type(model).__name__} cannot be copied ({error}), and prepare_saq never changes the model it is given: "
            "remove attributes that do not deepcopy, such as open files"
        ) from error
    make_picklable(own)
    _uncompile(own)
    return own


class Uncompiled(nn.Module):
    """What `torch.compile` has made of a module, under the same names, as if it had not been compiled."""

    def __init__(self, compiled: nn.Module) -> None:
        super().__init__()
        vars(self).update({name: value for name, value in vars(compiled).items() if name in STRUCTURE})
        self.training = compiled.training

    def __getattr__(self, name: str) -> Any:
        """An attribute of the module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self._orig_mod(*args, **kwargs)


def _uncompile(model: nn.Module) -> None:
    modules = list(model.modules())
    compiled = [each for each in modules if "_orig_mod" in each._modules]
    plain = {each: Uncompiled(each) for each in compiled if isinstance(each, torch._dynamo.OptimizedModule)}
    for module in modules if plain else ():
        module._modules.update({name: plain[each] for name, each in module._modules.items() if each in plain})
        replace_references(module, plain)


def copy_module(module: _Module, memo: _Memo | None = None) -> _Module:
    """As `copy.deepcopy`, which spends most of its time on the ten tables that each module has, nearly all empty."""
    memo = {} if memo is None else memo
    kind: Any = type(module)
    if id(module) in memo or not _is_copied_by_attributes(kind):
        return copy.deepcopy(module, memo)
    own: _Module = object.__new__(kind)
    memo[id(module)], attributes = own, vars(own)
    state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
    for name, value in state.items():
        if type(value) in _IMMUTABLE:
            attributes[name] = value
        elif name in STRUCTURE and id(value) not in memo:
            attributes[name] = memo[id(value)] = value.copy()
            if value and isinstance(value, dict):
                attributes[name].update({key: _copy(each, memo) for key, each in value.items()})
        else:
            attributes[name] = _copy(value, memo)
    return own


def keep_copyable(module: nn.Module) -> None:
    """Has `copy.deepcopy` copy a wrapper, and not the graph in it whose attributes it passes off as its own."""
    if type(module).__getattr__ is not nn.Module.__getattr__ and not hasattr(type(module), "__deepcopy__"):
        vars(module)["__deepcopy__"] = partial(_copy_wrapper, module)


def _copy_wrapper(module: nn.Module, memo: _Memo) -> nn.Module:
    own: nn.Module = object.__new__(type(module))
    memo[id(module)] = own
    vars(own).update({name: copy.deepcopy(each, memo) for name, each in vars(module).items() if name != "__deepcopy__"})
    keep_copyable(own)
    return own


def _copy(value: Any, memo: _Memo) -> Any:
    if isinstance(value, nn.Module):
        return copy_module(value, memo)
    if type(value) is FunctionType:
        return _copy_function(value, memo)
    if isinstance(value, nn.Parameter) and value._backward_hooks and id(value) not in memo:
        parameter = copy.deepcopy(value, memo)
        for hook in value._backward_hooks.values():
            parameter.register_hook(hook)  # type: ignore[no-untyped-call]
        return parameter
    if type(value) in (list, dict) and id(value) not in memo:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        functions = {key: each for key, each in items if type(each) is FunctionType}
        own = memo[id(value)] = copy.deepcopy(value, memo)
        for key, each in functions.items():
            own[key] = _copy_function(each, memo)
        return own
    return copy.deepcopy(value, memo)


def _copy_function(function: FunctionType, memo: _Memo) -> FunctionType:
    """A function (a hook, a lambda in an attribute) that knows the copies of the modules that the given one knows.

    To `copy.deepcopy` functions are constants: those of a copy would run the original's modules.
    """
    if id(function) in memo or not _knows_modules(function):
        return cast("FunctionType", memo.get(id(function), function))

    def fresh(value: Any) -> Any:
        return _copy(value, memo) if _knows_modules(value) else value

    cells = function.__closure__ or ()
    copied_cells = [cell for cell in cells if id(cell) not in memo and _knows_modules(cell)]
    memo.update((id(cell), CellType()) for cell in copied_cells)
    closure = tuple(memo.get(id(cell), cell) for cell in cells)
    own = FunctionType(function.__code__, function.__globals__, function.__name__, closure=closure)
    memo[id(function)] = update_wrapper(own, function)
    vars(own).pop("__wrapped__")
    vars(own).update(vars(function))
    for cell in copied_cells:
        memo[id(cell)].cell_contents = fresh(cell.cell_contents)
    own.__defaults__ = function.__defaults__ and tuple(map(fresh, function.__defaults__))
    named = function.__kwdefaults__
    own.__kwdefaults__ = named and {name: fresh(value) for name, value in named.items()}
    return own


def _knows_modules(value: Any, seen: frozenset[int] = frozenset()) -> bool:
    """Whether a value is a module, a weight, a method of one, or a function that has such among what it encloses."""
    if type(value) is CellType:
        try:
            return _knows_modules(value.cell_contents, seen)
        except ValueError:  # it is empty
            return False
    if type(value) is FunctionType:
        known = (*(value.__closure__ or ()), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return id(value) not in seen and any(_knows_modules(each, seen | {id(value)}) for each in known)
    owner = value.__self__ if type(value) is MethodType else value
    return isinstance(owner, nn.Parameter) or holds_modules(owner)


@cache
def _is_copied_by_attributes(kind: Any) -> bool:
    """Whether `copy.deepcopy` would copy the attributes of such a module, one by one, and do nothing else."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind not in dispatch_table
        and kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and kind.__setstate__ is nn.Module.__setstate__
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )
