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


def take(gm: nn.Module, module: nn.Module) -> None:
    """Has a graph, or a module in one, do with checkpoints what a module does (older names, other layouts).

    But for functions inside functions, such as weight_norm's, with which it would not pickle.
    """
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
