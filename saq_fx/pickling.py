"""Graphs as plain data, which pickles: `fx` drops what nodes have been annotated with."""

import importlib
from dataclasses import replace
from typing import Any

from torch import fx
from torch.fx.node import _get_qualified_name

from saq_fx import annotation
from saq_fx.effects import OnlyIn


def dump_graph(graph: fx.Graph) -> dict[str, Any]:
    """The graph as plain data: nodes by position, references to nodes as `_Reference`."""
    position = {node: index for index, node in enumerate(graph.nodes)}

    def by_position(value: Any) -> Any:
        reference: Any = lambda node: _Reference(position[node])  # noqa: E731
        return fx.map_arg(value, reference)

    nodes = [
        (node.op, node.name, _dump_target(node.target), by_position(node.args), by_position(node.kwargs))
        for node in graph.nodes
    ]
    return {"nodes": nodes, "metas": annotation.dump_meta(graph.nodes), "codegen": graph._codegen}


def _dump_target(target: Any) -> Any:
    """A function by its public name, since several of torch's (`F.max_pool2d`, operator overloads) do not pickle."""
    if isinstance(target, str):
        return target
    if isinstance(target, OnlyIn):
        return replace(target, function=_dump_target(target.function))
    name = _get_qualified_name(target)
    return _Function(name) if _find_function(name) is target else target


def _load_target(target: Any) -> Any:
    if isinstance(target, OnlyIn):
        return replace(target, function=_load_target(target.function))
    return _find_function(target.name) if isinstance(target, _Function) else target


def _find_function(name: str) -> Any:
    module, *path = name.split(".") if "." in name else ("builtins", name)
    found: Any = importlib.import_module(module)
    for part in path:
        found = getattr(found, part, None)
    return found


class _Function:
    """Stands for a function of a pickled graph, by its qualified name."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Reference:
    """Stands for the node at a position of a pickled graph."""

    def __init__(self, position: int) -> None:
        self.position = position


def load_graph(data: dict[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for op, name, target, args, kwargs in data["nodes"]:
        node = graph.create_node(op, _load_target(target), _resolve(args, nodes), _resolve(kwargs, nodes), name=name)
        nodes.append(node)
    annotation.restore_meta(nodes, data["metas"])
    graph.set_codegen(data["codegen"])
    return graph


def _resolve(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, _Reference):
        return nodes[value.position]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_resolve(item, nodes) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item, nodes) for item in value)
    if isinstance(value, dict):
        return {key: _resolve(item, nodes) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_resolve(item, nodes) for item in (value.start, value.stop, value.step)))
    return value
