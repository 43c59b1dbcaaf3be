"""What values a graph that is being recorded has on the example inputs, and which of them are data."""

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from saq_fx.dataflow import reads_shape_only
from saq_fx.effects import is_random
from saq_fx.graph import call_arguments
from saq_fx.held import is_same, modules_in
from saq_fx.modes import is_flag
from saq_fx.nested import cloned
from saq_fx.operation_names import source_of, writes_first
from saq_fx.runtime import switch_autocast
from saq_fx.state import runs_python, unmoved


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes what operations ran: `sized_by_value` as `nonzero`'s output is, `random` as `rand`'s."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sized_by_value = False
        self.random = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation."""
        if func is torch.ops.aten.index.Tensor:
            self.sized_by_value |= any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            # Libraries do not tag their own operations, torchvision's nms for one.
            self.sized_by_value |= torch.Tag.dynamic_output_shape in func.tags or func.namespace not in (
                "aten",
                "prims",
            )
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class ExampleValues:
    """Values of nodes on the example inputs, computed in the order of the graph and only as far as asked for."""

    def __init__(self, tracer: fx.Tracer, arguments: Mapping[str, Any]) -> None:
        self.running = False
        self.changed_arguments = set[fx.Node]()
        self._tracer, self._arguments = tracer, arguments
        self._values: dict[fx.Node, Any] = {}
        self._written: dict[nn.Parameter, Tensor] = {}  # what these were before nodes wrote to them
        # Sets of nodes: inputs and their items; what depends on inputs; and see `is_computed`.
        self._inputs: set[fx.Node] = set()
        self._dependent: set[fx.Node] = set()
        self._numbers: set[fx.Node] = set()
        self._sized_by_numbers: set[fx.Node] = set()

    def value(self, node: fx.Node) -> Any:
        """The value of a node."""
        self.running = True
        try:
            with torch.no_grad(), torch.random.fork_rng():
                for each in self._tracer.graph.nodes:
                    if each not in self._values:
                        with _Operations() as operations:
                            self._values[each] = self._compute(each)
                        self._classify(each, operations)
        finally:
            self.running = False
        return self._values[node]

    def is_computed(self, node: fx.Node, kind: str) -> bool:
        """Whether what is asked of a node depends on numbers that flow through the network, not on its settings.

        Numbers are floating-point tensors that depend on the inputs, random ones, and all that is computed from them,
        the sizes of what they select included. Integer and boolean inputs (tokens, masks) are settings.
        """
        of_tensor = isinstance(self.value(node), Tensor | bool | int | float)
        return node in (self._numbers if of_tensor and kind != "len" else self._sized_by_numbers)

    def may_change_type(self, node: fx.Node) -> bool:
        """Whether a value may be of another type next time: an input's, or computed from one that is no tensor."""
        value = self.value(node)
        return node in self._inputs or (node in self._dependent and not isinstance(value, Tensor))

    def _classify(self, node: fx.Node, operations: _Operations) -> None:
        sources, value = set(node.all_input_nodes), self._values[node]
        if node.op == "placeholder" or self._is_input_item(node):
            self._inputs.add(node)
            sources = set()
        if reads_shape_only(node):
            if sources & self._sized_by_numbers:
                self._numbers.add(node)
            return
        if node in self._inputs or sources & self._dependent:
            self._dependent.add(node)
            if isinstance(value, Tensor) and value.is_floating_point():
                self._numbers.add(node)
        if sources & self._sized_by_numbers or (operations.sized_by_value and sources & self._numbers):
            self._sized_by_numbers.add(node)
        if operations.random or is_random(node) or sources & (self._numbers | self._sized_by_numbers):
            self._numbers.add(node)
            if writes_first(node):
                self._numbers.update(node.all_input_nodes[:1])

    def _is_input_item(self, node: fx.Node) -> bool:
        """Whether a node picks an item of an input that is a dictionary or sequence."""
        source: Any = node.args[0] if node.target is operator.getitem else None
        return source in self._inputs and not isinstance(self._values[source], Tensor)

    def forget(self, node: fx.Node) -> None:
        """Let go of a node that is no longer in the graph."""
        self._values.pop(node, None)

    def clear(self) -> None:
        """Let go of all values, which otherwise wait for the collection of the cycles that the tracer is part of.

        Parameters are what they were.
        """
        self._values.clear()
        for parameter, before in self._written.items():
            parameter.data.copy_(before)
        self._written.clear()

    def _compute(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            given = self._arguments.get(str(node.target), node.args[0] if node.args else None)
            return cloned(given)
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(self._tracer.root.get_submodule(owner), name)
            # Running statistics and averaged parameters that this run moves must not be the model's own.
            is_trained = isinstance(value, nn.Parameter) and value.requires_grad
            return value.clone() if isinstance(value, Tensor) and not is_trained else value
        written = self._values.get(source_of(node)) if writes_first(node) else None
        if isinstance(written, nn.Parameter) and written not in self._written:
            self._written[written] = written.detach().clone()
        args, kwargs = call_arguments(node, self._values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.target is switch_autocast:
            return False  # this run may end within the scope
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if is_flag(node):
            return False
        module = self._tracer.root.get_submodule(str(node.target))
        with (
            evaluation_flags(module),
            _unchanged(module) if runs_python(module) else nullcontext(),
        ):
            before = [(each, each.copy()) for each in _containers((args, kwargs))]
            output = module(*args, **kwargs)
            if any(not is_same(each, copied) for each, copied in before):
                self.changed_arguments.add(node)
            return output


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Within: a module may run that does what it likes. Afterwards its state and its parameters are as before."""
    saved = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    with unmoved(module):
        yield
    for parameter, before in saved:
        parameter.data.copy_(before)


def _containers(value: Any) -> Iterator[Any]:
    """The lists and dictionaries in the arguments of a call."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            if type(item) in (list, dict):
                yield item
            yield from _containers(item)


@contextmanager
def evaluation_flags(module: nn.Module) -> Iterator[None]:
    """Within: the flags of a module and of all in it say evaluation, so that no running statistic moves."""
    saved = {each: each.training for each in modules_in(module)}
    _set_flags(dict.fromkeys(saved, False))
    try:
        yield
    finally:
        _set_flags(saved)


def _set_flags(flags: Mapping[nn.Module, bool]) -> None:
    """Where they are kept, for setting an attribute of a module takes long; scripted modules keep them elsewhere."""
    for module, flag in flags.items():
        if "training" in vars(module):
            vars(module)["training"] = flag
        else:
            module.training = flag
