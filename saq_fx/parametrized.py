"""Parametrized modules (`torch.nn.utils.parametrize`), whose classes torch makes one by one and refuses to pickle."""

from collections import OrderedDict
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from saq_fx.held import modules_in


def plain_class(module: nn.Module) -> type:
    """The class that a module had before it was parametrized, if it was."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def add_properties(module: nn.Module) -> None:
    """Gives a module, of a class of its own, the properties by which code reads its parametrized tensors."""
    parametrizations: Any = module._modules.get("parametrizations")
    for name in parametrizations or ():
        parametrize._inject_property(module, name)


def make_picklable(model: nn.Module) -> None:
    """Gives the parametrized modules of a model classes that pickle; those that they had stay as they are."""
    for module in modules_in(model):
        if "parametrizations" not in module._modules:
            continue  # the question below takes longer
        kind = type(module)
        if parametrize.is_parametrized(module) and "__reduce_ex__" not in vars(kind):
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, {**own, "__reduce_ex__": _reduce})


def _reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
    kind, state = plain_class(module), dict(vars(module))
    # weight_norm's, which reads checkpoints of its older form, is a function inside a function.
    hooks = state["_load_state_dict_pre_hooks"].items()
    kept = {key: each for key, each in hooks if "<locals>" not in getattr(each.hook, "__qualname__", "")}
    state["_load_state_dict_pre_hooks"] = OrderedDict(kept)
    return kind.__new__, (kind,), state, None, None, _restore


def _restore(module: nn.Module, state: dict[str, Any]) -> None:
    vars(module).update(state)
    parametrize._inject_new_class(module)
    add_properties(module)
    make_picklable(module)
