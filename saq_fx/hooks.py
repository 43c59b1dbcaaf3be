"""Hooks of a model that is traced: what they compute is part of the graph, and what they only look at is not."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import fx, nn

from saq_fx.effects import has_effects
from saq_fx.held import Snapshot, forward_hooks, function_of, is_same, kept_by, modules_in
from saq_fx.modes import is_within
from saq_fx.rewriting import last_node
from saq_fx.runtime import require_same_path

_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))
_FORWARD_TABLES = ("_forward_pre_hooks", "_forward_hooks")


@contextmanager
def preserve_hook_state(model: nn.Module) -> Iterator[None]:
    """On leaving, what the model's hooks keep is what it was."""
    saved = [(held, Snapshot(held)) for hook in forward_hooks(model) for held in kept_by(hook)]
    try:
        yield
    finally:
        for held, before in saved:
            before.restore(held)


@contextmanager
def preserve_hooks(model: nn.Module) -> Iterator[None]:
    """On leaving, the model has the hooks that it had, and what they keep is what it was."""
    tables = HookTables(model)
    try:
        with preserve_hook_state(model):
            yield
    finally:
        tables.put_back()


class HookTables:
    """The hooks of a model's modules as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = modules_in(model)
        self._before = self._now()

    def _now(self) -> dict[tuple[nn.Module, str], dict[Any, Any]]:
        held = ((module, vars(module)) for module in self._modules)
        hooked = [(module, here) for module, here in held if any(map(here.get, _TABLES))]
        return {(module, name): dict(here[name]) for module, here in hooked for name in _TABLES if here.get(name)}

    @property
    def changed(self) -> bool:
        """Whether hooks were installed or removed since."""
        return self._now() != self._before

    def put_back(self) -> None:
        """Makes the tables what they were."""
        for module, name in {**self._before, **self._now()}:
            table = vars(module)[name]
            table.clear()
            table.update(self._before.get((module, name), {}))


@dataclass(frozen=True)
class _Call:
    """A hook's call: what it was shown and what it returned (nodes of their own for these values), what it computed."""

    path: str
    hook: Callable[..., Any]
    shown: list[fx.Node]
    computed: list[fx.Node]
    returned: list[fx.Node]
    gave_value: bool

    @property
    def is_read(self) -> bool:
        """Whether others read what the hook kept."""
        own = {*self.shown, *self.computed, *self.returned}
        read = own.difference(self.returned)
        return any(user not in own for node in read if node.op != "get_attr" for user in node.users)

    @property
    def computes(self) -> bool:
        """Whether it gave a value, or changed one."""
        return self.gave_value or any(
            has_effects(node) and node.target is not require_same_path for node in self.computed
        )


class HookCalls:
    """The calls of hooks while a model is traced."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._calls: list[_Call] = []
        self._before: dict[Any, list[tuple[Any, Snapshot]]] = {}  # by hook: what it keeps

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
            if id(hook) not in self._before:
                self._before[id(hook)] = [(held, Snapshot(held)) for held in kept_by(hook)]
            shown, returned = _Views(self._tracer), _Views(self._tracer)
            views = [shown.of(each) for each in given]
            last = last_node(self._tracer.graph)
            result = hook(module, *views)
            computed = list(takewhile(lambda node: node is not last, reversed(self._tracer.graph.nodes)))
            shown.write_back()
            gives = not (result is None or result is views[-1] or _are_same(result, views))
            result = returned.of(result) if gives else None
            self._calls.append(_Call(path, hook, shown.nodes, computed, returned.nodes, gives))
            return result

        return watched

    def settle(self, untraceable: dict[str, str]) -> dict[str, str]:
        """Takes out of the graph what hooks were shown.

        Returns:
            The modules (path -> reason) whose hooks did what a graph would not do again, such as keeping values.
        """
        calls = [call for call in self._calls if not any(is_within(call.path, path) for path in untraceable)]
        read = {_code(call.hook) for call in calls if call.is_read}
        computing = {_code(call.hook) for call in calls if call.computes and not self._has_kept(call.hook)}
        for node in (node for call in self._calls for node in (*call.returned, *call.shown)):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self._tracer.graph.erase_node(node)
        return {
            call.path: f"its hook {_name(call.hook)} does what no graph would do again, such as keeping values"
            for call in calls
            if _code(call.hook) not in read | computing
        }

    def _has_kept(self, hook: Callable[..., Any]) -> bool:
        return any(snapshot.moved(held) for held, snapshot in self._before[id(hook)])


class _Views:
    """Values for a hook to look at, by nodes that tell whether anyone reads what the hook keeps of them."""

    def __init__(self, tracer: Any) -> None:
        self.nodes: list[fx.Node] = []
        self._tracer = tracer
        self._containers: list[tuple[Any, Any, Any]] = []

    def of(self, value: Any) -> Any:
        """A view of a value, or of what is in it."""
        kind = type(value)
        if issubclass(kind, fx.Proxy):
            proxy = self._tracer.create_proxy("call_function", _itself, (value,), {})
            self.nodes.append(proxy.node)
            return proxy
        if kind is tuple:
            return tuple([self.of(each) for each in value])
        if kind not in (list, dict):
            return value
        view = {name: self.of(each) for name, each in value.items()} if kind is dict else [self.of(e) for e in value]
        self._containers.append((value, view, view.copy()))
        return view

    def write_back(self) -> None:
        """Makes lists and dictionaries what the hook has made of their views."""
        for value, view, before in self._containers:
            if not is_same(view, before):
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(view)


def _itself(value: Any) -> Any:
    return value


def _are_same(result: Any, given: list[Any]) -> bool:
    """Whether a hook that is shown several values gives back just these."""
    if type(result) is not tuple or len(result) != len(given):
        return False
    return all(value is other for value, other in zip(result, given, strict=True))


def _code(hook: Callable[..., Any]) -> Any:
    """By which hooks are told apart: those that one place of the code installs go together."""
    function = function_of(hook)
    return function.__code__ if isinstance(function, types.FunctionType) else type(hook)


def _name(hook: Callable[..., Any]) -> str:
    return getattr(function_of(hook), "__qualname__", type(hook).__name__)
