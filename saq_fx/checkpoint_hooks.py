"""Hooks by which modules read and write checkpoints: a graph does with checkpoints what its model does."""

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

from saq_fx.held import STRUCTURE

TABLES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class _Hook:
    """What a hook does with checkpoints of a module of a class, done with a graph, or a module in one.

    The hook is shown an object of that class that has all that the graph has, and the attributes of the module.
    """

    def __init__(self, hook: Callable[..., Any], kind: type) -> None:
        update_wrapper(self, hook)
        self._hook, self._kind = hook, kind

    def __call__(self, graph: nn.Module, *args: Any) -> Any:
        """Runs the hook."""
        seen: Any = object.__new__(self._kind)
        object.__setattr__(seen, "__dict__", graph.__dict__)
        return self._hook(seen, *args)


class _ExtraState(_Hook):
    """One of the two hooks below; a part, which has the class of its module, does this by itself."""

    def __call__(self, graph: nn.Module, *args: Any) -> Any:
        """Runs the hook."""
        return None if _has_extra_state(type(graph)) else super().__call__(graph, *args)


def _has_extra_state(kind: type[nn.Module]) -> bool:
    return kind.get_extra_state is not nn.Module.get_extra_state


def _save_extra_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    state[f"{prefix}_extra_state"] = module.get_extra_state()


def _load_extra_state(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}_extra_state" in state:
        module.set_extra_state(state.pop(f"{prefix}_extra_state"))


def take(graph: nn.Module, module: nn.Module) -> None:
    """Has a graph, or a module in one, do with checkpoints what a module does (older names, other layouts, more state).

    But for what torch has made functions in functions for (weight_norm), with which a graph would not pickle.
    """
    kind, found = type(module), [(table, key, hook) for table in TABLES for key, hook in vars(module)[table].items()]
    hooks = [each for each in found if not _is_left_out(each[-1])]
    if hooks or _has_extra_state(kind):
        for name, value in vars(module).items():
            if name not in STRUCTURE and not hasattr(type(graph), name):
                vars(graph).setdefault(name, value)
    for table, key, hook in hooks:
        is_wrapped = isinstance(hook, _WrappedHook)
        if is_wrapped and not hook.with_module:
            vars(graph)[table][key] = hook
        else:
            function = _function_of(hook)
            shown = function if isinstance(function, _Hook) else _Hook(function, kind)
            vars(graph)[table][key] = _WrappedHook(shown, graph) if is_wrapped else shown
    if _has_extra_state(kind):
        graph.register_state_dict_post_hook(_ExtraState(_save_extra_state, kind))  # type: ignore[no-untyped-call]
        graph.register_load_state_dict_pre_hook(_ExtraState(_load_extra_state, kind))  # type: ignore[no-untyped-call]


def _function_of(hook: Any) -> Any:
    return hook.hook if isinstance(hook, _WrappedHook) else hook


def _is_left_out(hook: Any) -> bool:
    function = _function_of(hook)
    if isinstance(function, _Hook):
        return False
    owner = str(getattr(function, "__module__", None)).partition(".")[0]
    return owner == "saq_fx" or (owner == "torch" and "<locals>" in getattr(function, "__qualname__", ""))
