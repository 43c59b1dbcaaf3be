"""Hooks by which modules read and write checkpoints: a graph does with checkpoints what its model does."""

from collections.abc import Callable
from functools import partial, update_wrapper
from typing import Any

from torch import nn
from torch.nn.modules.module import _WrappedHook

TABLES = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class _Hook:
    """What a hook does with checkpoints of the module that it was registered on, which a graph is no object of."""

    def __init__(self, hook: Callable[..., Any], module: nn.Module) -> None:
        update_wrapper(self, hook)
        self._hook, self._module = hook, module

    def __call__(self, graph: nn.Module, *args: Any) -> Any:
        """Runs the hook of the module."""
        return self._hook(self._module, *args)


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _save_extra_state(module: nn.Module, graph: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not _has_extra_state(graph):  # a part has the class of its module
        state[f"{prefix}_extra_state"] = module.get_extra_state()


def _load_extra_state(module: nn.Module, graph: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    key = f"{prefix}_extra_state"
    if key in state and not _has_extra_state(graph):
        module.set_extra_state(state.pop(key))


def take(gm: nn.Module, module: nn.Module) -> None:
    """Has a graph, or a module in one, do with checkpoints what a module does (older names, other layouts, more state).

    But for functions inside functions, such as weight_norm's, with which it would not pickle.
    """
    if _has_extra_state(module):
        gm.register_state_dict_post_hook(partial(_save_extra_state, module))  # type: ignore[no-untyped-call]
        gm.register_load_state_dict_pre_hook(partial(_load_extra_state, module))  # type: ignore[no-untyped-call]
    for table in TABLES:
        for key, hook in vars(module)[table].items():
            is_wrapped = isinstance(hook, _WrappedHook)
            function = hook.hook if is_wrapped else hook
            is_ours = getattr(function, "__module__", "").startswith("saq_fx.")  # of a graph that is made into another
            if is_ours or "<locals>" in getattr(function, "__qualname__", ""):
                continue
            if not is_wrapped:
                vars(gm)[table][key] = _Hook(function, module)
            else:
                vars(gm)[table][key] = partial(function, module) if hook.with_module else hook
