"""What a model is given: example inputs, and how they are arguments of its forward."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from saq_fx.errors import TracingError, TrainingError

ExampleInputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Batch = tuple[ExampleInputs, Any]


def split_inputs(example_inputs: ExampleInputs) -> Inputs:
    """Example inputs as (positional, keyword) arguments: a tensor, a sequence of positionals or a dict of keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def split_batch(batch: Any) -> Batch:
    """A batch as (inputs, targets); raises TrainingError for anything but a pair."""
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        found = f"{len(batch)} of them" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TrainingError(
            f"batches must give pairs (inputs, targets), not {found}: wrap the loader, or its collate_fn"
        )
    return batch[0], batch[1]


@dataclass(frozen=True)
class Arguments:
    """How `forward` is called: example values by name (None: no examples), and what is left at its default.

    So many of the examples as `positional` says are passed by position.
    """

    given: dict[str, Any] | None
    fixed: dict[str, Any]
    positional: int
    inputs: Inputs | None


def arguments_of(model: nn.Module, inputs: Inputs | None) -> Arguments:
    """How a model is called with these inputs; raises TracingError where it takes none such."""
    signature = inspect.signature(model.forward)
    given: dict[str, Any] | None = None
    if inputs is not None:
        given = bound_arguments(model, inputs)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
    fixed = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty and name not in (given or {})
    }
    return Arguments(given, fixed, _required_arguments(model) if inputs is None else len(inputs[0]), inputs)


def _required_arguments(model: nn.Module) -> int:
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(each.kind is not each.KEYWORD_ONLY and each.default is each.empty for each in parameters)


def bound_arguments(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Inputs by the names that `forward` gives them; raises TracingError where it takes none such."""
    signature, (args, kwargs) = inspect.signature(model.forward), inputs
    try:
        return dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError as error:
        raise TracingError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error


def is_plain(default: Any) -> bool:
    """Whether the code of a graph can have this default of an argument."""
    if isinstance(default, tuple | list):
        return all(map(is_plain, default))
    return default is None or isinstance(default, bool | int | float | str | torch.dtype)


def default_in_graph(graph: fx.Graph, parameter: inspect.Parameter) -> tuple[Any, ...]:
    """The default of an argument as the next placeholder has it, or none; None stands for one that cannot be left out.

    The code of a graph has all arguments without a default in front of those that have one.
    """
    if is_plain(parameter.default):
        return (parameter.default,)
    return (None,) if any(node.args for node in graph.nodes if node.op == "placeholder") else ()
