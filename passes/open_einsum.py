"""Einsums of several operands become einsums of two."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from saq_fx.graph import SaqGraphModule, graphs
from saq_fx.operators import operator_of
from saq_fx.pass_base import Pass, PassResult
from saq_fx.rewriting import Tracer, as_proxies, replace_node


@dataclass(frozen=True)
class OpenEinsum(Pass):
    """Rewrites `einsum("a,b,c->d", x, y, z)` into `einsum("ab,c->d", einsum("a,b->ab", x, y), z)`, and so on.

    Only so are the operands of every product quantized. Operands are contracted from the left, as torch does without
    opt_einsum: an index is summed over by the first product after which nothing has it. What rounding differs by is
    why float graphs keep the einsum as it is.
    """

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Rewrites `gm` in place."""
        found = [node for _, part in graphs(gm) for node in part.graph.nodes if _has_several_operands(node)]
        for node in found:
            replace_node(node.graph, node, lambda tracer, node=node: _opened(node, tracer))  # type: ignore[misc]
        return PassResult(gm, bool(found))


def _has_several_operands(node: fx.Node) -> bool:
    entry = operator_of(node)
    if entry is None or entry.name != "einsum" or node.kwargs or len(node.args) < 4:
        return False
    equation, *operands = node.args
    return isinstance(equation, str) and all(isinstance(each, fx.Node) for each in operands)


def _opened(node: fx.Node, tracer: Tracer) -> Any:
    operands = as_proxies(node.args[1:], tracer)
    result = operands[0]
    for equation, operand in zip(equations_of_pairs(str(node.args[0])), operands[1:], strict=True):
        result = torch.einsum(equation, result, operand)
    return result


def equations_of_pairs(equation: str) -> list[str]:
    """An equation as one for each product, from the left: "bi,ij,bj->b" is "bi,ij->bj" and "bj,bj->b"."""
    inputs, arrow, output = equation.replace(" ", "").replace("...", ".").partition("->")
    left, *terms = inputs.split(",")
    if not arrow:
        indices = inputs.replace(",", "")
        output = "".join(sorted(each for each in set(indices) if each == "." or indices.count(each) == 1))
    found = []
    for position, term in enumerate(terms, 1):
        needed = set(output).union(*terms[position:])
        here = set(left + term)
        kept = [each for each in output if each in here]
        kept += sorted(each for each in here & needed if each not in output)
        result = "".join(kept) if position < len(terms) else output
        found.append(f"{left},{term}->{result}".replace(".", "..."))
        left = result
    return found
