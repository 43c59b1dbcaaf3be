"""Deep copies of models: what `copy.deepcopy` makes of them, in a fraction of its time, and hooks of gradients, too."""

import copy
from collections.abc import Callable
from copyreg import dispatch_table
from functools import cache, partial, update_wrapper
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from saq_fx.compiled import uncompile
from saq_fx.errors import TracingError
from saq_fx.held import PLAIN_TYPES, STRUCTURE, holds_modules, is_immutable, shared_with_hooks
from saq_fx.parametrized import make_picklable
from saq_fx.scopes import replaced

_Module = TypeVar("_Module", bound=nn.Module)
_Memo = dict[int, Any]


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, of modules before they were compiled; raises TracingError, saying why, for a model that has none."""
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
    uncompile(own)
    return own


def copy_module(module: _Module, memo: _Memo | None = None) -> _Module:
    """As `copy.deepcopy`, which spends most of its time on the ten tables that each module has, nearly all empty."""
    memo = {} if memo is None else memo
    kind: Any = type(module)
    if id(module) in memo or not _is_copied_by_attributes(kind):
        return copy.deepcopy(module, memo)
    own: _Module = object.__new__(kind)
    memo[id(module)] = own
    attributes: dict[str, Any] = {}
    state: dict[str, Any] = module.__getstate__()  # type: ignore[no-untyped-call]
    for name, value in state.items():
        if type(value) in PLAIN_TYPES:
            attributes[name] = value
        elif name in STRUCTURE and id(value) not in memo:
            attributes[name] = memo[id(value)] = value.copy()
            if value and isinstance(value, dict):
                attributes[name].update({key: _copy(each, memo) for key, each in value.items()})
        else:
            attributes[name] = value if is_immutable(value) else _copy(value, memo)
    own.__setstate__(attributes)  # type: ignore[no-untyped-call]
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
    if type(value) is Tensor:
        return _copy_tensor(value, memo)
    if type(value) is FunctionType:
        return _copy_function(value, memo)
    if isinstance(value, nn.Parameter):
        return _copy_parameter(value, memo)
    if type(value) in (list, dict) and id(value) not in memo:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        functions = {key: each for key, each in items if type(each) is FunctionType}
        own = memo[id(value)] = copy.deepcopy(value, memo)
        for key, each in functions.items():
            own[key] = _copy_function(each, memo)
        return own
    return copy.deepcopy(value, memo)


def _copy_tensor(tensor: Tensor, memo: Any) -> Tensor:
    """As `copy.deepcopy`, in a tenth of the time where a tensor is all that there is in its memory."""
    is_ordinary = tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda") and not tensor.requires_grad
    if not is_ordinary or vars(tensor) or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return copy.deepcopy(tensor, memo)
    memory, copies = tensor.untyped_storage(), memo.setdefault("torch", {})
    if id(tensor) in memo or memory._cdata in copies or memory.nbytes() != tensor.nbytes:
        return copy.deepcopy(tensor, memo)
    own = memo[id(tensor)] = tensor.clone()
    copies[memory._cdata] = own.untyped_storage()  # where torch looks for it: other tensors may share it
    return own


def _copy_parameter(parameter: nn.Parameter, memo: _Memo) -> nn.Parameter:
    """As `copy.deepcopy`, with the hooks of its gradient."""
    if id(parameter) in memo:
        return cast("nn.Parameter", memo[id(parameter)])
    own: Any = parameter.__deepcopy__(memo)  # type: ignore[no-untyped-call]
    memo[id(parameter)] = own
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        own.requires_grad_(True)  # that of a frozen one runs as soon as it is not
        for hook in (parameter._backward_hooks or {}).values():
            own.register_hook(_copy(hook, memo))
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            own.register_post_accumulate_grad_hook(_copy(hook, memo))
        own.requires_grad_(parameter.requires_grad)
    return cast("nn.Parameter", own)


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
    """Whether `copy.deepcopy` would copy the attributes of such a module, one by one, and set them."""
    return (
        not hasattr(kind, "__deepcopy__")
        and kind not in dispatch_table
        and kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and kind.__getstate__ is nn.Module.__getstate__
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )
