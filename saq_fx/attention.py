"""Attention written out: projections, two products, and the softmax between them.

The `open_…` functions run on `fx.Proxy` values while a graph is rewritten, and make the two products explicit nodes
that can be quantized and counted. The other functions are nodes of the rewritten graph: masks have ranks and types
that only a run knows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention_probabilities(scores: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Softmax over keys under a mask.

    Args:
        scores: (..., queries, keys), scaled.
        mask: broadcastable to `scores`; boolean (True takes part) or added.
        is_causal: query i sees keys 0..i only.
    """
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, float("-inf"))
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    unseen = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(unseen, 0.0)


def merged_masks(
    query: Tensor, attention_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int
) -> Tensor | None:
    """The masks of `nn.MultiheadAttention` as one added mask.

    Args:
        query: (..., heads, queries, width), whose type the mask takes.
        attention_mask: (queries, keys) or (batch * heads, queries, keys); boolean (True is left out) or added.
        key_padding_mask: (keys,) or (batch, keys); boolean (True is left out) or added.

    Returns:
        A mask broadcastable to (batch, heads, queries, keys), None without masks.
    """
    if attention_mask is not None:
        attention_mask = _added(attention_mask, query)
        if attention_mask.dim() == 3 and query.dim() == 4:
            attention_mask = attention_mask.reshape(
                -1, heads if len(attention_mask) > 1 else 1, *attention_mask.shape[1:]
            )
    if key_padding_mask is not None:
        key_padding_mask = _added(key_padding_mask, query)[..., None, None, :]
    if attention_mask is None or key_padding_mask is None:
        return key_padding_mask if attention_mask is None else attention_mask
    return attention_mask + key_padding_mask


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def softmax_scale(query: Tensor) -> float:
    """1 / sqrt(width of a head)."""
    return float(query.shape[-1] ** -0.5)


def open_scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`F.scaled_dot_product_attention` as two products; its arguments and result."""
    if enable_gqa:
        groups = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = _call(softmax_scale, query) if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * factor
    probabilities = _dropped(_call(attention_probabilities, scores, attn_mask, is_causal), dropout_p)
    return torch.matmul(probabilities, value)


def _dropped(probabilities: Any, dropout_p: Any) -> Any:
    never = isinstance(dropout_p, int | float) and dropout_p == 0
    return probabilities if never else F.dropout(probabilities, dropout_p)


def _call(function: Any, proxy: Any, *args: Any) -> Any:
    """Records a call of one of this module's functions as a node, instead of running through it."""
    return proxy.tracer.create_proxy("call_function", function, (proxy, *args), {})


def can_open(module: nn.MultiheadAttention) -> bool:
    """Whether every option of an attention module has an open form here."""
    return module.bias_k is None and not module.add_zero_attn


def open_multihead_attention(
    module: nn.MultiheadAttention,
    parameter: Any,
    training: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Any, Any]:
    """`nn.MultiheadAttention.forward` as projections around attention; its arguments and results.

    Args:
        parameter: name -> proxy of that parameter of the module, None where it has none.
        training: makes the proxy of the module's training flag; called where dropout needs it.
    """
    heads = module.num_heads
    if module.batch_first:
        query, key, value = _sequence_first(query, key, value)
    projected = _projections(parameter, query, key, value)
    query, key, value = (each.unflatten(-1, (heads, -1)).movedim(0, -2) for each in projected)
    mask = None
    if attn_mask is not None or key_padding_mask is not None:
        mask = _call(merged_masks, query, attn_mask, key_padding_mask, heads)
    dropout_p = _call(dropout_probability, training(), module.dropout) if module.dropout else 0.0
    weights = None
    if need_weights:
        scores = torch.matmul(query * module.head_dim**-0.5, key.transpose(-2, -1))
        scores = scores if mask is None else scores + mask
        probabilities = _dropped(_call(attention_probabilities, scores), dropout_p)
        result = torch.matmul(probabilities, value)
        weights = probabilities.mean(-3) if average_attn_weights else probabilities
    else:
        causal = is_causal and mask is None
        result = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, causal)
    result = result.movedim(-2, 0).flatten(-2)
    result = F.linear(result, parameter("out_proj.weight"), parameter("out_proj.bias"))
    return result.movedim(0, -2) if module.batch_first else result, weights


def _sequence_first(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """(batch, sequence, width) as (sequence, batch, width), torch's order of summing; one tensor once."""
    moved = {id(each): each.movedim(-2, 0) for each in (query, key, value)}
    return moved[id(query)], moved[id(key)], moved[id(value)]


def dropout_probability(training: bool, probability: float) -> float:
    """The dropout probability of the current mode: 0 outside training."""
    return probability if training else 0.0


def _projections(parameter: Any, query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """Query, key and value after their input projections; one packed projection where one tensor is all three."""
    weight, bias = parameter("in_proj_weight"), parameter("in_proj_bias")
    if weight is None:
        weights = tuple(parameter(f"{letter}_proj_weight") for letter in "qkv")
    elif query is key and key is value:
        return _thirds(F.linear(query, weight, bias), -1)
    else:
        weights = _thirds(weight, 0)
    biases = (None, None, None) if bias is None else _thirds(bias, 0)
    query, key, value = (
        F.linear(each, each_weight, each_bias)
        for each, each_weight, each_bias in zip((query, key, value), weights, biases, strict=True)
    )
    return query, key, value


def _thirds(proxy: Any, axis: int) -> tuple[Any, Any, Any]:
    chunks = proxy.chunk(3, axis)
    return chunks[0], chunks[1], chunks[2]
