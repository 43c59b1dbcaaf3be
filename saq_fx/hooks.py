"""Hooks of a model that is traced: what they compute is part of the graph, and what they only look at is not."""

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from saq_fx.effects import has_effects
from saq_fx.modes import is_within
from saq_fx.runtime import require_same_path
from saq_fx.state import Snapshot

_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))
_FORWARD_TABLES = ("_forward_pre_hooks", "_forward_hooks")


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run at every call of the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def forward_hooks(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """The hooks that run before or after the forward of any of the model's modules."""
    for module in model.modules():
        if has_forward_hooks(module):
            for name in _FORWARD_TABLES:
                yield from vars(module)[name].values()


def lists_of_hooks(model: nn.Module) -> Iterator[Any]:
    """Lists and dictionaries that hooks know as variables, and so share with all copies of the model."""
    for value in (value for hook in forward_hooks(model) for value in _variables(hook).values()):
        if isinstance(value, list | dict):
            items = value.values() if isinstance(value, dict) else value
            if not any(isinstance(each, nn.Module) for each in items):
                yield value


@contextmanager
def preserve_hook_state(model: nn.Module) -> Iterator[None]:
    """On leaving, what the model's hooks keep (lists, dictionaries, attributes of objects) is what it was."""
    saved = [(held, Snapshot(held)) for hook in forward_hooks(model) for held in _held(hook)]
    try:
        yield
    finally:
        for held, before in saved:
            before.restore(held)


class HookTables:
    """The hooks of a model's modules as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._now()

    def _now(self) -> dict[tuple[nn.Module, str], dict[Any, Any]]:
        held = ((module, vars(module)) for module in self._model.modules())
        return {(module, name): dict(here[name]) for module, here in held for name in _TABLES if here.get(name)}

    @property
    def changed(self) -> bool:
        """Whether hooks were installed or removed since."""
        return self._now() != self._before

    def put_back(self) -> None:
        """Makes the tables what they were."""
        for module, name in self._now():
            table = vars(module)[name]
            table.clear()
            table.update(self._before.get((module, name), {}))


@dataclass(frozen=True)
class _Call:
    """A hook's call: what it was shown (nodes of its own for the same values), and what it computed."""

    path: str
    hook: Callable[..., Any]
    shown: list[fx.Node]
    computed: list[fx.Node]
    returned: bool

    @property
    def is_in_graph(self) -> bool:
        """Whether what the hook did is part of the graph: it gave a value, changed one, or others read what it kept."""
        if self.returned or any(has_effects(node) and node.target is not require_same_path for node in self.computed):
            return True
        own = {*self.shown, *self.computed}
        return any(user not in own for node in own if node.op != "get_attr" for user in node.users)


class HookCalls:
    """The calls of hooks while a model is traced."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._calls: list[_Call] = []

    @contextmanager
    def noted(self, module: nn.Module, path: str) -> Iterator[None]:
        """Within: calls of the module's hooks are noted."""
        tables = [vars(module)[name] for name in _FORWARD_TABLES]
        saved = [dict(table) for table in tables]
        watched = [{key: self._watched(hook, path) for key, hook in table.items()} for table in saved]
        for table, hooks in zip(tables, watched, strict=True):
            table.update(hooks)
        try:
            yield
        finally:
            for table, hooks, before in zip(tables, watched, saved, strict=True):
                table.update({key: before[key] for key, hook in hooks.items() if table.get(key) is hook})

    def _watched(self, hook: Callable[..., Any], path: str) -> Callable[..., Any]:
        def watched(module: nn.Module, *given: Any) -> Any:
            if self._tracer.is_evaluating:
                return hook(module, *given)
            shown: list[fx.Node] = []
            views = [self._shown(each, shown) for each in given]
            last = next(reversed(self._tracer.graph.nodes), None)
            result = hook(module, *views)
            computed = []
            for node in reversed(self._tracer.graph.nodes):
                if node is last:
                    break
                computed.append(node)
            returned = None if result is views[-1] else result
            self._calls.append(_Call(path, hook, shown, computed, returned is not None))
            return returned

        return watched

    def _shown(self, value: Any, shown: list[fx.Node]) -> Any:
        """A value for a hook to look at, by nodes that tell whether anyone reads what the hook keeps of it."""
        if isinstance(value, fx.Proxy):
            proxy = self._tracer.create_proxy("call_function", _itself, (value,), {})
            shown.append(proxy.node)
            return proxy
        return tuple([self._shown(each, shown) for each in value]) if type(value) is tuple else value

    def settle(self, untraceable: dict[str, str]) -> dict[str, str]:
        """Takes out of the graph what hooks were shown.

        Returns:
            The modules (path -> reason) whose hooks did what a graph would not do again, such as keeping values.
        """
        calls = [call for call in self._calls if not any(is_within(call.path, path) for path in untraceable)]
        in_graph = {_code(call.hook) for call in calls if call.is_in_graph}
        for node in (node for call in calls for node in call.shown):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self._tracer.graph.erase_node(node)
        return {
            call.path: f"its hook {_name(call.hook)} does what no graph would do again, such as keeping values"
            for call in calls
            if _code(call.hook) not in in_graph
        }


def _itself(value: Any) -> Any:
    return value


def _code(hook: Callable[..., Any]) -> Any:
    """By which hooks are told apart: those that one place of the code installs go together."""
    function = getattr(hook, "__func__", hook)
    return function.__code__ if isinstance(function, types.FunctionType) else type(hook)


def _name(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)


def _held(hook: Callable[..., Any]) -> list[dict[str, Any]]:
    """What a hook can keep values in: variables from outside, and attributes of the objects among them."""
    variables = _variables(hook)
    objects = [each for each in (getattr(hook, "__self__", hook), *variables.values()) if _is_plain_object(each)]
    return [variables, *(vars(each) for each in objects)]


def _variables(hook: Callable[..., Any]) -> dict[str, Any]:
    function = getattr(hook, "__func__", hook)
    if not isinstance(function, types.FunctionType):
        return {}
    found = inspect.getclosurevars(function)
    return {**found.globals, **found.nonlocals}


def _is_plain_object(value: Any) -> bool:
    kinds = (type, types.ModuleType, types.FunctionType, nn.Module, Tensor, fx.Proxy)
    return hasattr(value, "__dict__") and not isinstance(value, kinds)
