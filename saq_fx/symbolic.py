"""The tracer: one recorded run of a model's forward, with example values where control flow asks for them."""

import dataclasses
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from saq_fx.attention import can_open, open_multihead_attention
from saq_fx.bytecode import multiplies
from saq_fx.errors import TracingError
from saq_fx.given import given
from saq_fx.guards import GuardedTracer
from saq_fx.held import has_forward_hooks, holds_modules, modules_in
from saq_fx.hooks import HookCalls, preserve_hook_state
from saq_fx.inputs import default_in_graph
from saq_fx.modes import flag_path
from saq_fx.operation_names import writes_first
from saq_fx.patching import patched, telling_types
from saq_fx.places import place_and_cause
from saq_fx.proxies import TrainingMarker
from saq_fx.rewriting import last_node, set_args
from saq_fx.runtime import build_object, class_name, find_class, is_importable, require_default, require_given
from saq_fx.scopes import GradientFlow
from saq_fx.state import Attributes, Kept, reject_written_buffers, rejected_chance, runs_python

_CONSTANTS = (bool, int, float, str, type(None))


class SymbolicTracer(GuardedTracer):
    """Records one run of a model's forward on symbolic inputs.

    Leaves are torch's own layers, except those that hold other modules, hooks or parametrizations, and modules
    without parameters that behave differently in training (stochastic depth, custom dropouts). Those, and functions
    that asked for being leaves (`fx.wrap`), are followed all the same if they multiply tensors.

    Where Python needs a value (`if`, `len`, `range`), it is computed from the example inputs, and a guard node makes
    sure that a later run with other values is an error and not another function. A submodule whose code cannot be
    followed, or that asks for a value which the network computes, is a leaf too; `untraceable` says why, by path.

    Args:
        arguments: name -> example value of each argument of `forward` that is in use; None traces without examples.
        fixed: name -> default of each argument that is not.
        positional: how many of the arguments are passed by position.
        leaves: path -> why a module cannot be followed, of those that are known beforehand.
        forgotten: attributes that forward must write before it reads them (see `saq_fx.state`).
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        arguments: Mapping[str, Any] | None,
        fixed: Mapping[str, Any],
        positional: int,
        leaves: Mapping[str, str],
        forgotten: Kept,
    ) -> None:
        super().__init__(arguments)
        self.fixed = fixed
        self.untraceable = dict(leaves)
        self.kept: Kept = {}
        self.outside_of_graphs: dict[str, str] = {}
        self.scopes_without_gradients = 0
        self._built = 0  # objects that nodes build
        self._positional = positional
        self._forgotten = forgotten
        self._parameters: dict[str, Any] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Records `root.forward`.

        Then `kept` says what state it keeps in attributes, and `outside_of_graphs` which modules have hooks that a
        graph would not run, and why.
        """
        self.root = root
        self._hooks = HookCalls(self)
        self._paths = set(modules_in(root))
        self._attributes = Attributes(root)
        self._gradients = GradientFlow(root, self.arguments)
        for module in self._paths:
            if isinstance(module.__dict__["training"], TrainingMarker):
                module.__dict__["training"].tracer = self
        try:
            with preserve_hook_state(root):
                with patched(self), rejected_chance():
                    graph = super().trace(root, concrete_args)
                self.outside_of_graphs = self._hooks.settle(self.untraceable)
            self._reject_changing_guards()
            for path in self.untraceable:
                self._attributes.reject_given(root.get_submodule(path), path)
            reject_written_buffers(self._forgotten)
            self.kept = self._attributes.kept(self.depends_on_data)
            return graph
        finally:
            self._attributes.restore_all(root)
            self._examples.clear()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node of the graph."""
        if module_qualified_name in self.untraceable:
            return True
        if type(m) is nn.MultiheadAttention and "forward" not in vars(m):
            return True
        if any(child is not None for child in m._modules.values()) or has_own_call(m):
            return False
        if super().is_leaf_module(m, module_qualified_name):
            return True
        if isinstance(m, fx.GraphModule):
            return False
        forward = type(m).forward
        is_parameterless = not any(True for _ in m.parameters())
        return is_parameterless and "training" in forward.__code__.co_names and not multiplies(forward, type(m))

    @property
    def current_path(self) -> str:
        """The path of the module whose forward runs now."""
        return next(reversed(self.module_stack.values()), ("", None))[0]

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """A node; detached where the model computes it without gradients that the graph would give it."""
        node = super().create_node(kind, target, (), {}, name, type_expr)
        set_args(node, args, kwargs)
        if self.scopes_without_gradients and self._gradients.reaches(node):
            return self._without_gradient(node)
        if kind == "call_method" and target == "backward":
            raise TracingError("forward computes gradients, which no graph does")
        return node

    def _without_gradient(self, node: fx.Node) -> fx.Node:
        """A node under `no_grad`: the same without a history, where it has values that could have one."""
        value: Any = None if self.arguments is None else self._examples.value(node)
        if _is_without_gradient(value):
            self._gradients.stops_at(node)
            return node
        if node.op == "get_attr":  # a parameter itself has its gradient again outside of the scope
            return node
        if not (writes_first(node) or "out" in node.kwargs):
            if isinstance(value, Tensor):
                return self._detached(node)
            if type(value) in (list, tuple) and all(isinstance(item, Tensor) for item in value):
                create = super().create_node
                picked = [create("call_function", operator.getitem, (node, index), {}) for index in range(len(value))]
                return create("call_function", type(value), ([self._detached(item) for item in picked],), {})
        raise TracingError(f"{node} is computed under no_grad, and gradients would reach it in a graph")

    def _detached(self, node: fx.Node) -> fx.Node:
        return super().create_node("call_method", "detach", (node,), {})

    def create_arg(self, a: Any) -> Any:
        """Lowers an argument; a training flag becomes a node that reads it."""
        kind = type(a)  # of the most frequent, which fx asks for last
        if issubclass(kind, fx.Proxy):
            return a.node
        if kind is tuple:
            return tuple([self.create_arg(each) for each in a])
        if kind in _CONSTANTS or (kind is dict and not a):
            return a
        if isinstance(a, TrainingMarker):
            return self._flag_node(a.owner)
        if isinstance(a, np.generic):
            return a.item()
        if isinstance(a, torch.Generator):
            raise TracingError("forward draws from a generator that it is not given, which no graph does")
        if kind is OrderedDict:
            items = [(name, self.create_arg(value)) for name, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and dataclasses.is_dataclass(a):
            # A dictionary to fx, of which its own type would not come back (the outputs of transformers).
            items = {name: self.create_arg(value) for name, value in a.items()}
            return self.create_node("call_function", type(a), (), items)
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return self._lower_object(a)

    def _lower_object(self, value: Any) -> fx.Node:
        """An object that fx does not know (a cache, a custom output) as a node that builds it from its attributes."""
        if isinstance(value, type):
            return self.create_node("call_function", find_class, (class_name(value),), {})
        if not hasattr(value, "__dict__") or not is_importable(type(value)):
            raise NotImplementedError(f"an argument or output of type {type(value).__name__}")
        self._built += 1
        attributes = {name: self.create_arg(each) for name, each in vars(value).items()}
        return self.create_node("call_function", build_object, (class_name(type(value)), attributes), {})

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records a leaf, follows any other module as far as it can be followed."""
        if self._examples.running:
            return forward(*args, **kwargs)
        if m not in self._paths:
            if any(each is m for each in self.root.modules()) and any(True for _ in m.parameters()):
                raise TracingError("forward calls a module that it has created itself")
            return forward(*args, **kwargs)
        if has_forward_hooks(m):
            with self._hooks.noted(m, self.path_of_module(m)):
                return self._follow(m, forward, args, kwargs)
        return self._follow(m, forward, args, kwargs)

    def _follow(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.arguments is None or m is self.root:
            _reject_backward_hooks(m)
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if type(m) is nn.MultiheadAttention and not can_open(m):
            self.untraceable.setdefault(path, "it attends to keys that are not its input's")
        if path in self.untraceable:
            return self._python_leaf(path, args, kwargs)
        last, stack = last_node(self.graph), self.module_stack.copy()
        # Torch's own layers, which are most of the calls, have no code that sets any.
        attributes = self._attributes.of_part(m) if m._modules or runs_python(m) else None
        try:
            _reject_backward_hooks(m)
            with nullcontext() if type(m).__module__.startswith("torch.nn.") else rejected_chance():
                output = super().call_module(m, forward, args, kwargs)
            reject_written_buffers((m, name) for name in m._buffers if (m, name) in self._forgotten)
            self._reject_changing_guards()
            return output
        except Exception as error:
            self.module_stack = stack
            if attributes is not None:
                attributes.restore(m)
            self._erase_after(last)
            self.untraceable[path] = place_and_cause(error)
            return self._python_leaf(path, args, kwargs)

    def _python_leaf(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        """A call of a module that stays Python code; an error if that changes what it is given other than tensors."""
        if overrides_call(self.root.get_submodule(path)):
            raise TracingError(f"module {path!r} stays Python code, and overrides __call__, which has run in part")
        if holds_modules((args, kwargs)):
            raise TracingError(f"module {path!r} stays Python code, and is given a module that it may call")
        built = self._built
        proxy = self.create_proxy("call_module", path, args, kwargs)
        if self._built != built:
            raise TracingError(f"module {path!r} stays Python code, and may change an object that it is given")
        if any(isinstance(each, list | dict) for each in (*args, *kwargs.values())):
            self._examples.value(proxy.node)
            if proxy.node in self._examples.changed_arguments:
                raise TracingError(f"module {path!r} stays Python code, and changes a list or dictionary of its caller")
        return proxy

    def _erase_after(self, last: fx.Node | None) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)
            self._examples.forget(node)
            if node.op == "get_attr":
                self._parameters.pop(str(node.target), None)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """An attribute of a module: a proxy for parameters, unless an example value is being computed."""
        if self._examples.running or isinstance(attr_val, fx.Proxy):
            return attr_val
        self._parameters = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _flag_node(self, owner: str) -> fx.Node:
        # The flag itself comes later: forward may go through all that its module holds.
        return self.create_node("call_module", flag_path(owner), (), {})

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder an argument; an argument fixed at its default gets a guard that rejects other values."""
        positional: list[Any] = [self.root]
        keyword: dict[str, Any] = {}
        # Of the object: a model may have chosen among several forwards when it was made.
        parameters = inspect.signature(self.root.forward).parameters
        for name, parameter in parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL and (self.arguments or {}).get(name):
                raise TracingError(f"a graph takes no {parameter}")
            if parameter.kind is parameter.VAR_KEYWORD:
                more = [each for each in self.arguments or {} if each not in parameters]
                keyword |= {each: self._root_argument(each, parameter) for each in more}
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = self._root_argument(name, parameter)
            if name in self.fixed:
                continue  # a decorator may set what is not passed
            if parameter.kind is parameter.POSITIONAL_ONLY or len(positional) <= self._positional:
                positional.append(value)
            else:
                keyword[name] = value
        _reject_backward_hooks(self.root)
        if type(self.root) is nn.MultiheadAttention and can_open(self.root) and not has_own_call(self.root):
            return lambda root, *args: self._open_attention(root, *args, **keyword), positional
        # As a call, not only its forward, so that the hooks of the model itself are recorded as well.
        return lambda root, *args: self._call_root(root, *args, **keyword), positional

    def _call_root(self, root: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with telling_types(self):
            if overrides_call(root):
                return root(*args, **kwargs)
            with self._hooks.noted(root, ""):
                return _symbolic_trace._orig_module_call(root, *args, **kwargs)

    def _open_attention(self, attention: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        """Where attention is not in a graph, in which it could be a leaf, but is all of it."""

        def training() -> fx.Proxy:
            return self.proxy(self._flag_node(""))

        def parameter(path: str) -> Any:
            return operator.attrgetter(path)(attention)

        with telling_types(self):
            return open_multihead_attention(attention, parameter, training, *args, **kwargs)

    def _root_argument(self, name: str, parameter: inspect.Parameter) -> Any:
        is_none = name in (self.arguments or {}) and (self.arguments or {})[name] is None
        if name not in self.fixed and not is_none:
            return self._given_argument(name, parameter)
        # Code asks by `is None`, which a symbolic value cannot answer.
        fixed = self.fixed.get(name)
        if fixed is None or isinstance(fixed, bool | int | float | str):
            placeholder = self.create_proxy("placeholder", name, (fixed,), {})
            self.create_node("call_function", require_default, (placeholder.node, fixed, name), {})
        return None

    def _given_argument(self, name: str, parameter: inspect.Parameter) -> Any:
        proxy = self._placeholder(name, parameter)
        return proxy if self.arguments is None else given(self, proxy, self.arguments.get(name, parameter.default))

    def _placeholder(self, name: str, parameter: inspect.Parameter) -> Any:
        default = default_in_graph(self.graph, parameter)
        proxy = self.create_proxy("placeholder", name, default, {})
        if default == (None,) and self.arguments is not None:
            self.create_node("call_function", require_given, (proxy.node, name), {})
        return proxy


def _is_without_gradient(value: Any) -> bool:
    """Whether a value is of a type that no gradient flows through."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, bool | int | float)


def _reject_backward_hooks(module: nn.Module) -> None:
    if module._backward_hooks or module._backward_pre_hooks:
        raise TracingError(f"{type(module).__name__} has backward hooks, which no graph runs")


def overrides_call(module: nn.Module) -> bool:
    """Whether a class does more at a call than torch does: runs hooks and forward."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


def has_own_call(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's forward, or something else.

    That is: hooks (as `weight_norm`'s), parametrizations, a forward that the object was given itself, or a `__call__`.
    """
    has_more = "parametrizations" in module._modules or "forward" in vars(module)
    return has_more or has_forward_hooks(module) or overrides_call(module)
