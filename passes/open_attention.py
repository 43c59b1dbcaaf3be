"""Fused attention becomes two products with a softmax between them."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from saq_fx.attention import open_scaled_dot_product_attention
from saq_fx.graph import SaqGraphModule, graphs
from saq_fx.operators import operator_of
from saq_fx.pass_base import Pass, PassResult
from saq_fx.rewriting import Tracer, as_proxies, replace_node


@dataclass(frozen=True)
class OpenAttention(Pass):
    """Rewrites `scaled_dot_product_attention(q, k, v)` into `matmul(softmax(matmul(q, k^T) * scale + mask), v)`.

    Only so can the operands of both products be quantized (SAQ, Sec. 5: all matrix multiplications, self-attention
    included). The result differs from the fused kernel's by floating-point rounding, so float graphs keep that one.
    """

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Rewrites `gm` in place."""
        fused = [node for _, part in graphs(gm) for node in part.graph.nodes if _is_fused_attention(node)]
        for node in fused:
            replace_node(node.graph, node, lambda tracer, node=node: _opened(node, tracer))  # type: ignore[misc]
        return PassResult(gm, bool(fused))


def _is_fused_attention(node: fx.Node) -> bool:
    entry = operator_of(node)
    return entry is not None and entry.name == "scaled_dot_product_attention"


def _opened(node: fx.Node, tracer: Tracer) -> Any:
    args, kwargs = as_proxies((node.args, node.kwargs), tracer)
    return open_scaled_dot_product_attention(*args, **kwargs)
