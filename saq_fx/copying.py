"""Deep copies of models: what `copy.deepcopy` makes of them, in a fraction of its time."""

import copy
from collections.abc import Callable
from copyreg import dispatch_table
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from saq_fx.errors import TracingError
from saq_fx.held import STRUCTURE, shared_with_hooks
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
    return own


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
            attributes[name] = copy.deepcopy(value, memo)
    return own


def _copy(value: Any, memo: _Memo) -> Any:
    return copy_module(value, memo) if isinstance(value, nn.Module) else copy.deepcopy(value, memo)


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
