"""What Python asks of symbolic values, answered from the example inputs and guarded in the graph."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from types import FrameType
from typing import Any

from torch import Tensor, fx, nn

from saq_fx.dataflow import reads_shape_only
from saq_fx.errors import TracingError
from saq_fx.example_values import ExampleValues
from saq_fx.graph import attribute_at
from saq_fx.operation_names import source_of, writes_first
from saq_fx.places import line_of_user
from saq_fx.proxies import GuardedProxy
from saq_fx.rewriting import last_node
from saq_fx.runtime import CONCRETE, require_same_path


class GuardedTracer(fx.Tracer):
    """Answers `if`, `len` and `range` by example; a guard node rejects inputs for which the answer is another.

    Args:
        arguments: name -> example value of each argument of `forward` that is in use; None traces without examples.
    """

    def __init__(self, arguments: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.arguments = arguments
        self._examples = ExampleValues(self, arguments or {})
        self._of_buffers: dict[fx.Node, set[str]] = {}  # guards on what is decided by buffers
        self._index_guards: list[tuple[fx.Node | None, FrameType, int]] = []

    @property
    def is_evaluating(self) -> bool:
        """Whether what runs now is not recorded, but computes an example value."""
        return self._examples.running

    def proxy(self, node: fx.Node) -> GuardedProxy:
        """A stand-in for a node's value."""
        return GuardedProxy(node, self)

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
        self.guard(obj.node, kind, expected)
        return expected

    def guard(self, node: fx.Node, kind: str, expected: Any) -> None:
        """Makes inputs an error for which a node has another length, type or whatever `kind` asks of it."""
        place = f"{self.scope.module_path or type(self.root).__name__}, {line_of_user()}"
        guard = self.create_node("call_function", require_same_path, (node, kind, expected, place), {})
        if buffers := self._buffers_behind(node):
            self._of_buffers[guard] = buffers

    def _buffers_behind(self, node: fx.Node) -> set[str]:
        """The buffers, and what else is no parameter, whose values decide a value."""
        pending, seen, found = [node], {node}, set[str]()
        while pending:
            each = pending.pop()
            if each.op == "get_attr" and not isinstance(attribute_at(self.root, str(each.target)), nn.Parameter):
                found.add(str(each.target))
            if not reads_shape_only(each):
                pending.extend(source for source in each.all_input_nodes if source not in seen)
                seen.update(each.all_input_nodes)
        return found

    def _reject_changing_guards(self) -> None:
        """Raises TracingError if a path depends on a buffer that forward itself changes (flags of a first call)."""
        if not self._of_buffers:
            return
        asked = {buffer for node in self.graph.nodes for buffer in self._of_buffers.get(node, ())}
        for node in self.graph.nodes:
            source = source_of(node) if writes_first(node) else node
            if source is not node and source.op == "get_attr" and source.target in asked:
                raise TracingError(f"control flow depends on {source.target}, which forward changes")

    def number(self, kind: Callable[[Any], Any], obj: fx.Proxy) -> Any:
        """`int` or `float` of a proxy: symbolic of a number that sizes or settings decide, of the example otherwise."""
        value = self.example(obj)
        if not isinstance(value, Real | Tensor) or self._examples.is_computed(obj.node, kind.__name__):
            return self.concrete(obj, kind.__name__)
        return self.create_proxy("call_function", kind, (obj,), {})

    def extreme(self, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        """`max` or `min` of several values: symbolic of numbers that sizes decide, by example otherwise."""
        for each in values:
            if issubclass(type(each), fx.Proxy):
                is_number = isinstance(self.example(each), Real)
                if not is_number or self._examples.is_computed(each.node, function.__name__):
                    return function(values)
        return self.create_proxy("call_function", function, (list(values),), {})

    def length(self, obj: fx.Proxy) -> Any:
        """The length of a tensor, symbolic; of all else that of the example inputs."""
        if not isinstance(self.example(obj), Tensor) or self._examples.is_computed(obj.node, "len"):
            return self.concrete(obj, "len")
        return obj.size(0)

    def index(self, obj: fx.Proxy, frame: FrameType) -> int:
        """The int of a proxy, guarded, which code in that frame asks for."""
        expected = int(self.concrete(obj, "int"))
        self._index_guards.append((last_node(self.graph), frame, frame.f_lasti))
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
            if guard is None or (id(asking), instruction) not in running or guard is not last_node(self.graph):
                break
            self.graph.erase_node(guard)
            self._examples.forget(guard)

    def instance(self, obj: fx.Proxy) -> Any:
        """A value of the type that a proxy stands for, guarded where other inputs may bring another type."""
        if self.arguments is None:
            raise TracingError(f"control flow depends on the type of {obj.node}: pass example_inputs to decide it")
        value = self.example(obj)
        if self._examples.may_change_type(obj.node):
            self.guard(obj.node, "type", CONCRETE["type"](value))
        return value

    def may_vary(self, obj: fx.Proxy) -> bool:
        """Whether a value is a setting that other inputs may bring otherwise: integers or booleans of theirs."""
        if self.arguments is None:
            return True
        value = self.example(obj)
        is_number = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        return not is_number and self.depends_on_data(obj.node, or_parameters=False)

    def hash_of(self, obj: fx.Proxy) -> int:
        """By the value, guarded, of a number that is a setting; by identity of all else, as of tensors."""
        if self.arguments is not None and not self.is_evaluating and self.may_vary(obj):
            kind = type(self.example(obj))
            if kind in (bool, int, float):
                return hash(self.concrete(obj, kind.__name__))
        return object.__hash__(obj)

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

    def depends_on_data(self, node: fx.Node, or_parameters: bool) -> bool:
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
