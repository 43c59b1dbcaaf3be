"""Which nodes of two graphs of one model, traced in its two modes, are one and the same step of it."""

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import fx

from saq_fx.annotation import owner_path
from saq_fx.effects import has_effects
from saq_fx.operators import operator_of

Run = tuple[bool, Sequence[fx.Node], Sequence[fx.Node]]
"""(whether the nodes of both graphs are pairs, those of the one, those of the other)."""


def aligned(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> Iterator[Run]:
    """Both sequences in runs, pairs or not. Layers are matched before what is between them."""
    done_first = done_second = 0
    for index_first, index_second in [*_layer_pairs(first, second), (len(first), len(second))]:
        yield from _runs(first[done_first:index_first], second[done_second:index_second])
        done_first, done_second = index_first, index_second


def chance_pairs(runs: Sequence[Run]) -> set[fx.Node]:
    """Nodes of the first graph whose pairs share no more than what they call, and better are two nodes.

    They are fed differently, and so are of other shapes perhaps; what one graph alone does with such a pair would get
    the value of the other graph.
    """
    pairs = [pair for are_pairs, *nodes in runs if are_pairs for pair in zip(*nodes, strict=True)]
    partners, differing, found = dict(pairs), set[fx.Node](), set[fx.Node]()
    for first, second in pairs:
        is_plain = first.op in ("call_function", "call_method") and operator_of(first) is None
        if is_plain and not has_effects(first) and not _are_fed_alike(first, second, partners, differing):
            differing.add(first)
    shared = {second: first for first, second in pairs}
    for first, second in reversed(pairs):
        users = [*first.users, *(shared.get(user, user) for user in second.users)]
        if first in differing and any(user not in partners or user in found for user in users):
            found.add(first)
    return found


def _are_fed_alike(first: fx.Node, second: fx.Node, partners: dict[fx.Node, fx.Node], differing: set[fx.Node]) -> bool:
    if not differing.isdisjoint(first.all_input_nodes):
        return False
    arguments = fx.map_arg((first.args, first.kwargs), lambda node: partners.get(node, node))
    return bool(arguments == (second.args, second.kwargs))


def read_parameters(node: fx.Node) -> frozenset[str]:
    """Paths of what a layer multiplies its input by: a module, or tensors that a function reads; else empty."""
    if node.op == "call_module":
        return frozenset({str(node.target)})
    if operator_of(node) is None:
        return frozenset()
    return frozenset(str(source.target) for source in node.all_input_nodes if source.op == "get_attr")


def _layer_pairs(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> Iterator[tuple[int, int]]:
    layers = [[index for index, node in enumerate(nodes) if read_parameters(node)] for nodes in (first, second)]
    keys = [
        [(_key(nodes[index]), read_parameters(nodes[index])) for index in indices]
        for nodes, indices in zip((first, second), layers, strict=True)
    ]
    for start_first, start_second, length in SequenceMatcher(
        None, keys[0], keys[1], autojunk=False
    ).get_matching_blocks():
        yield from zip(
            layers[0][start_first : start_first + length], layers[1][start_second : start_second + length], strict=True
        )


def _runs(first: Sequence[fx.Node], second: Sequence[fx.Node]) -> Iterator[Run]:
    keys = [[_key(node) for node in nodes] for nodes in (first, second)]
    if keys[0] == keys[1]:
        yield True, first, second
        return
    for tag, start, end, other_start, other_end in SequenceMatcher(
        None, keys[0], keys[1], autojunk=False
    ).get_opcodes():
        yield tag == "equal", first[start:end], second[other_start:other_end]


def _key(node: fx.Node) -> tuple[Any, ...]:
    return node.op, node.target, owner_path(node), len(node.args), tuple(node.kwargs)
