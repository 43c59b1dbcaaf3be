"""The tracer: one recorded run of a model's forward, with example values where control flow asks for them."""

import copy
import dataclasses
import importlib
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _symbolic_trace
from torch.nn.utils import parametrize

from saq_fx.attention import can_open, open_multihead_attention
from saq_fx.bytecode import multiplies
from saq_fx.errors import TracingError
from saq_fx.example_values import ExampleValues
from saq_fx.modes import flag_path
from saq_fx.patching import patched


class TrainingMarker(int):
    """Stands for `self.training` of the module at `owner` while tracing; notes where the code asks for its value."""

    owner: str
    asked_at: set[str]
    tracer: "SymbolicTracer | None"

    def __new__(cls, value: bool, owner: str) -> "TrainingMarker":
        """A marker of value 0 or 1."""
        marker = super().__new__(cls, value)
        marker.owner, marker.asked_at, marker.tracer = owner, set(), None
        return marker

    @property
    def value(self) -> bool:
        """The mode, without a note."""
        return int.__int__(self) != 0

    def __bool__(self) -> bool:
        if self.tracer is not None:
            self.asked_at.add(self.tracer.current_path)
        return self.value

    __hash__ = int.__hash__


def _asking(name: str) -> Callable[..., Any]:
    return lambda marker, *args: getattr(bool(marker), name)(*args)


for _name in ("int", "index", "float", "eq", "ne", "lt", "le", "gt", "ge", "neg", "invert", "str", "format"):
    setattr(TrainingMarker, f"__{_name}__", _asking(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor"):
    setattr(TrainingMarker, f"__{_name}__", _asking(f"__{_name}__"))
    setattr(TrainingMarker, f"__r{_name}__", _asking(f"__r{_name}__"))


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
        leaves: path -> why a module cannot be followed, of those that are known beforehand.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, arguments: Mapping[str, Any] | None, fixed: Mapping[str, Any], leaves: Mapping[str, str]
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.fixed = fixed
        self.untraceable = dict(leaves)
        self._examples = ExampleValues(self, arguments or {})
        self._index_guards: list[tuple[fx.Node, FrameType, int]] = []
        self._parameters: dict[str, Any] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Records `root.forward`."""
        self._paths = set(root.modules())
        self._attributes = Attributes(root)
        for module in root.modules():
            if isinstance(module.__dict__["training"], TrainingMarker):
                module.__dict__["training"].tracer = self
        try:
            with patched(self):
                return super().trace(root, concrete_args)
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

    def proxy(self, node: fx.Node) -> "GuardedProxy":
        """A stand-in for a node's value."""
        return GuardedProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """Lowers an argument; a training flag becomes a node that reads it."""
        if isinstance(a, fx.Proxy):  # the most frequent, which fx asks for last
            return a.node
        if isinstance(a, TrainingMarker):
            return self._flag_node(a.owner)
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
        if not hasattr(value, "__dict__"):
            raise NotImplementedError(f"an argument or output of type {type(value).__name__}")
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
        last, stack = next(reversed(self.graph.nodes), None), copy.copy(self.module_stack)
        try:
            _reject_backward_hooks(m)
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            self.module_stack = stack
            self._attributes.restore(m)
            self._erase_after(last)
            path = self.path_of_module(m)
            self.untraceable.setdefault(path, place_and_cause(error))
            return self.create_proxy("call_module", path, args, kwargs)

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
        if self._examples.running:
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
        expected = _CONCRETE[kind](value)
        self.create_node("call_function", require_same_path, (obj.node, kind, expected), {})
        return expected

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
            if parameter.kind is parameter.KEYWORD_ONLY:
                keyword[name] = value
            else:
                positional.append(value)
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
        if name not in self.fixed:
            default = () if parameter.default is parameter.empty else (parameter.default,)
            return self.create_proxy("placeholder", name, default, {})
        default = self.fixed[name]
        if default is None or isinstance(default, bool | int | float | str):
            placeholder = self.create_proxy("placeholder", name, (default,), {})
            self.create_node("call_function", require_default, (placeholder.node, default, name), {})
        return default


class GuardedProxy(fx.Proxy):
    """A proxy that takes concrete values from the example inputs where Python insists on them."""

    tracer: SymbolicTracer

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        return int(self.tracer.concrete(self, "len"))

    def __index__(self) -> int:
        return self.tracer.index(self, sys._getframe(1))

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        """Records a call; that torch asked for its sizes as integers before has decided nothing."""
        proxy: Any = _symbolic_trace._find_proxy(args or (), kwargs or {})
        if proxy is not None:
            proxy.tracer.drop_guards_of_call(sys._getframe(1))
        return super().__torch_function__(orig_method, types, args, kwargs)

    def __int__(self) -> int:
        return int(self.tracer.concrete(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self, "float"))


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


class Attributes:
    """Attributes and buffers of a model's modules, to be had back where forward put symbolic values (caches)."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = {module: (_own_attributes(module), dict(module._buffers)) for module in model.modules()}

    def restore(self, model: nn.Module) -> None:
        """Takes symbolic values out of the attributes of a model or a part of it."""
        for module in model.modules():
            attributes, buffers = self._saved.get(module, ({}, {}))
            _restore(vars(module), vars(module).keys() - _MODULE_ATTRIBUTES, attributes)
            _restore(module._buffers, module._buffers, buffers)


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module has that not every module has, with copies of lists and dictionaries, which forward may fill."""
    names = vars(module).keys() - _MODULE_ATTRIBUTES
    values = ((name, vars(module)[name]) for name in names)
    return {name: copy.copy(value) if isinstance(value, list | dict) else value for name, value in values}


def _restore(holder: dict[str, Any], names: Iterable[str], before: Mapping[str, Any]) -> None:
    for name in [name for name in names if _holds_proxy(holder[name])]:
        del holder[name]
        if name in before:
            holder[name] = before[name]


def _holds_proxy(value: Any) -> bool:
    if isinstance(value, fx.Proxy):
        return True
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list | tuple) and any(map(_holds_proxy, value))


def class_name(cls: type) -> str:
    """Where to find a class again."""
    return f"{cls.__module__}:{cls.__qualname__}"


def find_class(name: str) -> Any:
    """The class of a `class_name`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def build_object(name: str, attributes: Mapping[str, Any]) -> Any:
    """An object of the class of that name with these attributes."""
    cls = find_class(name)
    built = cls.__new__(cls)
    built.__dict__.update(attributes)
    return built


def _reject_backward_hooks(module: nn.Module) -> None:
    if module._backward_hooks or module._backward_pre_hooks:
        raise TracingError(f"{type(module).__name__} has backward hooks, which no graph runs")


def has_own_call(module: nn.Module) -> bool:
    """Whether calling a module does more than its forward: hooks (as `weight_norm`'s) or parametrizations."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or parametrize.is_parametrized(module)


def require_default(value: Any, default: Any, name: str) -> None:
    """Rejects a value for an argument that tracing has fixed at its default."""
    if not (value is default or value == default):
        raise TracingError(
            f"argument {name!r} was fixed at its default {default!r} when the model was prepared: pass it in "
            "example_inputs to prepare_saq if it is to vary"
        )


_CONCRETE: dict[str, Callable[[Any], Any]] = {"bool": bool, "len": len, "int": int, "float": float}


def require_same_path(value: Any, kind: str, expected: Any) -> None:
    """Rejects inputs for which the model would take another path than it took on the example inputs."""
    actual = _CONCRETE[kind](value)
    if actual != expected:
        raise TracingError(
            f"these inputs take another path through the model than the example inputs did: {kind} is "
            f"{actual}, it was {expected}. Prepare the model with example inputs of this kind"
        )


def place_and_cause(error: BaseException) -> str:
    """The last line of the user's code on the way to an error, and the first line of its message."""
    cause = (str(error) or type(error).__name__).splitlines()[0]
    return f"{_source_line(error)}: {cause}"


def _source_line(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    libraries = (torch.__path__[0], os.path.dirname(__file__))
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    if not own:
        return "no source line"
    return f"{own[-1].filename}:{own[-1].lineno} `{own[-1].line}`"
