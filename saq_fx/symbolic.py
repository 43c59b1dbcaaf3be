"""The tracer: one recorded run of a model's forward, with example values where control flow asks for them."""

import dataclasses
import inspect
import operator
import os
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from numbers import Real
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace

from saq_fx.attention import can_open, open_multihead_attention
from saq_fx.bytecode import multiplies
from saq_fx.dataflow import reads_shape_only
from saq_fx.errors import TracingError
from saq_fx.example_values import ExampleValues
from saq_fx.graph import attribute_at
from saq_fx.modes import flag_path
from saq_fx.operation_names import writes_first
from saq_fx.patching import patched
from saq_fx.proxies import GuardedProxy, TrainingMarker
from saq_fx.runtime import (
    CONCRETE,
    build_object,
    class_name,
    find_class,
    is_importable,
    require_default,
    require_same_path,
)
from saq_fx.scopes import GradientFlow
from saq_fx.state import Attributes, Kept, reject_written_buffers, rejected_chance

_LIBRARIES = (torch.__path__[0], os.path.dirname(__file__))


class SymbolicTracer(fx.Tracer):
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
        super().__init__()
        self.arguments = arguments
        self.fixed = fixed
        self.untraceable = dict(leaves)
        self.kept: Kept = {}
        self.scopes_without_gradients = 0
        self._built = 0  # objects that nodes build
        self._positional = positional
        self._forgotten = forgotten
        self._examples = ExampleValues(self, arguments or {})
        self._index_guards: list[tuple[fx.Node, FrameType, int]] = []
        self._parameters: dict[str, Any] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Records `root.forward`; `kept` then says what state it keeps in attributes."""
        self.root = root
        self._paths = set(root.modules())
        self._attributes = Attributes(root)
        self._gradients = GradientFlow(root, self.arguments)
        for module in root.modules():
            if isinstance(module.__dict__["training"], TrainingMarker):
                module.__dict__["training"].tracer = self
        try:
            with patched(self), rejected_chance():
                graph = super().trace(root, concrete_args)
            reject_written_buffers(self._forgotten)
            self.kept = self._attributes.kept(self._depends_on_data)
            return graph
        finally:
            self._attributes.restore(root)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one node of the graph."""
        if type(m) is nn.MultiheadAttention or module_qualified_name in self.untraceable:
            return True
        if any(True for _ in m.children()) or has_own_call(m):
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

    @property
    def is_evaluating(self) -> bool:
        """Whether what runs now is not recorded, but computes an example value."""
        return self._examples.running

    def proxy(self, node: fx.Node) -> GuardedProxy:
        """A stand-in for a node's value."""
        return GuardedProxy(node, self)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node; detached where the model computes it without gradients that the graph would give it."""
        node = super().create_node(kind, target, *args, **kwargs)
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

    def _depends_on_data(self, node: fx.Node, or_parameters: bool) -> bool:
        """Whether a value depends on more of the inputs than their sizes, or on parameters if these count too."""
        pending, seen = [node], {node}
        while pending:
            each = pending.pop()
            if each.op in ("placeholder", "call_module"):
                return True
            if (
                or_parameters
                and each.op == "get_attr"
                and isinstance(attribute_at(self.root, str(each.target)), nn.Parameter)
            ):
                return True
            if not reads_shape_only(each):
                pending.extend(source for source in each.all_input_nodes if source not in seen)
                seen.update(each.all_input_nodes)
        return False

    def create_arg(self, a: Any) -> Any:
        """Lowers an argument; a training flag becomes a node that reads it."""
        if isinstance(a, fx.Proxy):  # the most frequent, which fx asks for last
            return a.node
        if isinstance(a, TrainingMarker):
            return self._flag_node(a.owner)
        if isinstance(a, np.generic):
            return a.item()
        if type(a) is OrderedDict:
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
        if self._examples.running or m not in self._paths:
            return forward(*args, **kwargs)
        if self.arguments is None or m is self.root:
            _reject_backward_hooks(m)
            return super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if path in self.untraceable:
            return self._python_leaf(path, args, kwargs)
        last, stack = next(reversed(self.graph.nodes), None), self.module_stack.copy()
        try:
            _reject_backward_hooks(m)
            with nullcontext() if type(m).__module__.startswith("torch.nn.") else rejected_chance():
                output = super().call_module(m, forward, args, kwargs)
            reject_written_buffers((m, name) for name in m._buffers if (m, name) in self._forgotten)
            return output
        except Exception as error:
            self.module_stack = stack
            self._attributes.restore(m)
            self._erase_after(last)
            self.untraceable[path] = place_and_cause(error)
            return self._python_leaf(path, args, kwargs)

    def _python_leaf(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        """A call of a module that stays Python code; an error if that changes what it is given other than tensors."""
        built = self._built
        proxy = self.create_proxy("call_module", path, args, kwargs)
        if self._built != built:
            raise TracingError(f"module {path!r} stays Python code, and may change an object that it is given")
        if any(type(each) in (list, dict) for each in (*args, *kwargs.values())):
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

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth of a value, from the example inputs."""
        return bool(self.concrete(obj, "bool"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Items of a value whose length the example inputs tell."""
        if not hasattr(self.example(obj), "__getitem__") or isinstance(self.example(obj), Mapping):
            obj = self.create_proxy("call_function", list, (obj,), {})
        return iter([operator.getitem(obj, index) for index in range(self.concrete(obj, "len"))])

    def concrete(self, obj: fx.Proxy, kind: str) -> Any:
        """The bool, len, int or float of a proxy on the example inputs, guarded in the graph.

        Raises:
            TracingError: there are no example inputs.
        """
        value = self.example(obj)
        if self._examples.is_computed(obj.node, kind):
            raise TracingError(f"control flow depends on {kind}({obj.node}), which the network computes")
        expected = CONCRETE[kind](value)
        self._guard(obj.node, kind, expected)
        return expected

    def _guard(self, node: fx.Node, kind: str, expected: Any) -> None:
        place = f"{self.scope.module_path or type(self.root).__name__}, {_line_of_user()}"
        self.create_node("call_function", require_same_path, (node, kind, expected, place), {})

    def number(self, kind: Callable[[Any], Any], obj: fx.Proxy) -> Any:
        """`int` or `float` of a proxy: symbolic of a number that sizes decide, from the example inputs otherwise."""
        value = self.example(obj)
        if not isinstance(value, Real) or self._examples.is_computed(obj.node, kind.__name__):
            return self.concrete(obj, kind.__name__)
        return self.create_proxy("call_function", kind, (obj,), {})

    def length(self, obj: fx.Proxy) -> Any:
        """The length of a tensor, symbolic; of all else that of the example inputs."""
        if not isinstance(self.example(obj), Tensor) or self._examples.is_computed(obj.node, "len"):
            return self.concrete(obj, "len")
        return obj.size(0)

    def index(self, obj: fx.Proxy, frame: FrameType) -> int:
        """The int of a proxy, guarded, which code in that frame asks for."""
        expected = int(self.concrete(obj, "int"))
        self._index_guards.append((next(reversed(self.graph.nodes)), frame, frame.f_lasti))
        return expected

    def drop_guards_of_call(self, frame: FrameType | None) -> None:
        """Takes back guards on integers that were asked for by the call that is about to be recorded, from that frame.

        They are the last nodes of the graph, and the instructions that have led to them are still running.
        """
        guards, self._index_guards = self._index_guards, []
        if not guards:
            return
        running: set[tuple[int, int]] = set()
        while frame is not None:
            running.add((id(frame), frame.f_lasti))
            frame = frame.f_back
        for guard, asking, instruction in reversed(guards):
            if (id(asking), instruction) not in running or guard is not next(reversed(self.graph.nodes)):
                break
            self.graph.erase_node(guard)
            self._examples.forget(guard)

    def instance(self, obj: fx.Proxy) -> Any:
        """A value of the type that a proxy stands for, guarded where other inputs may bring another type."""
        if self.arguments is None:
            raise TracingError(f"control flow depends on the type of {obj.node}: pass example_inputs to decide it")
        value = self.example(obj)
        if self._examples.may_change_type(obj.node):
            self._guard(obj.node, "type", CONCRETE["type"](value))
        return value

    def may_vary(self, obj: fx.Proxy) -> bool:
        """Whether a value is a setting that other inputs may bring otherwise: integers or booleans of theirs."""
        if self.arguments is None:
            return True
        value = self.example(obj)
        is_number = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        return not is_number and self._depends_on_data(obj.node, or_parameters=False)

    def numpy_call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> fx.Proxy:
        """A function of numpy of sizes and other plain numbers; of tensors it is an error."""
        found: list[Any] = []
        fx.node.map_aggregate((args, kwargs), lambda item: found.append(item))
        if any(isinstance(each, fx.Proxy) and isinstance(self.example(each), Tensor) for each in found):
            raise TracingError(f"forward calls {function} of a tensor, which no graph does")
        return self.create_proxy("call_function", function, args, kwargs)

    def example(self, obj: fx.Proxy) -> Any:
        """The value of a proxy on the example inputs; raises TracingError where there are none."""
        if self.arguments is None:
            raise TracingError(f"control flow depends on the value of {obj.node}: pass example_inputs to decide it")
        return self._examples.value(obj.node)

    def _flag_node(self, owner: str) -> fx.Node:
        # The flag itself comes later: forward may go through all that its module holds.
        return self.create_node("call_module", flag_path(owner), (), {})

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder an argument; an argument fixed at its default gets a guard that rejects other values."""
        positional: list[Any] = [self.root]
        keyword: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(root_fn).parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if (self.arguments or {}).get(name):
                    raise TracingError(f"a graph takes no {parameter}")
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
        return lambda root, *args: _symbolic_trace._orig_module_call(root, *args, **keyword), positional

    def _open_attention(self, attention: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Any:
        """Where attention is not in a graph, in which it could be a leaf, but is all of it."""

        def training() -> fx.Proxy:
            return self.proxy(self._flag_node(""))

        def parameter(path: str) -> Any:
            return operator.attrgetter(path)(attention)

        return open_multihead_attention(attention, parameter, training, *args, **kwargs)

    def _root_argument(self, name: str, parameter: inspect.Parameter) -> Any:
        is_none = name in (self.arguments or {}) and (self.arguments or {})[name] is None
        if name not in self.fixed and not is_none:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            return self.create_proxy("placeholder", name, default, {})
        # Code asks by `is None`, which a symbolic value cannot answer.
        fixed = self.fixed.get(name)
        if fixed is None or isinstance(fixed, bool | int | float | str):
            placeholder = self.create_proxy("placeholder", name, (fixed,), {})
            self.create_node("call_function", require_default, (placeholder.node, fixed, name), {})
        return None


def _is_without_gradient(value: Any) -> bool:
    """Whether a value is of a type that no gradient flows through."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return isinstance(value, bool | int | float)


def _reject_backward_hooks(module: nn.Module) -> None:
    if module._backward_hooks or module._backward_pre_hooks:
        raise TracingError(f"{type(module).__name__} has backward hooks, which no graph runs")


def has_own_call(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward: hooks (as `weight_norm`'s) or parametrizations."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "parametrizations" in module._modules


def place_and_cause(error: BaseException) -> str:
    """The last line of the user's code on the way to an error, and the first line of its message."""
    cause = (str(error) or type(error).__name__).splitlines()[0]
    return f"{_source_line(error)}: {cause}"


def _line_of_user() -> str:
    """The file and line of the code that is running, past torch's and the tracer's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return "no source line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _source_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    if not own:
        return "no source line"
    return f"{own[-1].filename}:{own[-1].lineno} `{own[-1].line}`"
