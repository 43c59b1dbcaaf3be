"""Replacing a node by what a function records on proxies."""

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import fx

from saq_fx.annotation import inherit_owner

Tracer = fx.proxy.GraphAppendingTracer


def create_node(graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...] = ()) -> fx.Node:
    """As `fx.Graph.create_node`, which takes about twice as long: it looks for symbolic sizes and makes up names."""
    node = graph.create_node(op, target, name=target.replace(".", "_") if isinstance(target, str) else None)
    set_args(node, args)
    return node


def last_node(graph: fx.Graph) -> fx.Node | None:
    """The last node, None of an empty graph; in torch 2.11 its nodes in reverse are no iterator yet."""
    return next(iter(reversed(graph.nodes)), None)


def set_args(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any] = MappingProxyType({})) -> None:
    """As `node.args = args`, which also takes the node out of the table of its graph's targets and puts it back."""
    fx.Node.args.fset(node, args)  # type: ignore[attr-defined]
    if kwargs:
        fx.Node.kwargs.fset(node, kwargs)  # type: ignore[attr-defined]


def set_arg(node: fx.Node, position: int, value: fx.Node) -> None:
    """As `node.update_arg`; see `set_args`."""
    set_args(node, (*node.args[:position], value, *node.args[position + 1 :]))


def as_proxies(value: Any, tracer: Tracer) -> Any:
    """Nodes in nested arguments become proxies; one node is one proxy, so that `is` still tells equal operands."""
    proxies: dict[fx.Node, fx.Proxy] = {}

    def as_proxy(item: Any) -> Any:
        return proxies.setdefault(item, fx.Proxy(item, tracer)) if isinstance(item, fx.Node) else item

    return fx.node.map_aggregate(value, as_proxy)


def replace_node(
    graph: fx.Graph,
    node: fx.Node,
    expansion: Callable[[Tracer], Any],
    module_class: type | None = None,
) -> None:
    """Puts what `expansion` records in the place of a node; the new nodes inherit its owner."""
    previous = node.prev
    with graph.inserting_before(node):
        result = expansion(Tracer(graph))
    module = (str(node.target), module_class) if module_class is not None else None
    new = [previous.next]
    while new[-1] is not node:
        new.append(new[-1].next)
    inherit_owner(new[:-1], node, module)
    value = fx.node.map_aggregate(result, lambda item: item.node if isinstance(item, fx.Proxy) else item)
    _substitute(graph, node, value)


def _substitute(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Replaces uses of a node by a node, or by a tuple of nodes whose items users have picked."""
    if isinstance(value, fx.Node):
        node.replace_all_uses_with(value)
    else:
        for user in list(node.users):
            if user.target is operator.getitem and isinstance(value[user.args[1]], fx.Node):
                user.replace_all_uses_with(value[user.args[1]])
                graph.erase_node(user)
            else:
                _put_in_arguments(user, node, value)
    graph.erase_node(node)


def _put_in_arguments(user: fx.Node, node: fx.Node, value: Any) -> None:
    arguments: Any = fx.node.map_aggregate((user.args, user.kwargs), lambda item: value if item is node else item)
    user.args, user.kwargs = arguments
