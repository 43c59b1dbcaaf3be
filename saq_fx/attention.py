"""Attention written out: projections, two products, and the softmax between them.

The `open_…` functions run on `fx.Proxy` values while a graph is rewritten, and make the two products explicit nodes
that can be quantized and counted. The other functions are nodes of the rewritten graph: masks have ranks and types
that only a run knows.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
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
    query: Tensor, attention_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, is_causal: bool = False
) -> Tensor | None:
    """The masks of `nn.MultiheadAttention` as one added mask.

    Args:
        query: (..., heads, queries, width), whose type the mask takes.
        attention_mask: (queries, keys) or (batch * heads, queries, keys); boolean (True is left out) or added.
        key_padding_mask: (keys,) or (batch, keys); boolean (True is left out) or added.
        is_causal: whether the kernel is told to be causal instead.

    Returns:
        A mask broadcastable to (batch, heads, queries, keys), None without masks.
    """
    if is_causal:
        return None
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
    return _record(proxy, function, proxy, *args)


def _record(proxy: Any, function: Any, *args: Any) -> Any:
    """The same for a function that need not take the proxy whose graph it is recorded in."""
    return proxy.tracer.create_proxy("call_function", function, args, {})


def can_open(module: nn.MultiheadAttention) -> bool:
    """Whether every option of an attention module has an open form here."""
    return module.bias_k is None and not module.add_zero_attn


def functional_arguments(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a node that calls `F.multi_head_attention_forward`; None where it has no open form here."""
    bound = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if given.pop(name) is not None:
            return None
    fixed = ("num_heads", "need_weights", "average_attn_weights", "use_separate_proj_weight")
    if any(isinstance(given[name], fx.Node) for name in fixed) or given.pop("add_zero_attn") is not False:
        return None
    del given["embed_dim_to_check"]
    return given


def open_functional_attention(
    query: Any,
    key: Any,
    value: Any,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    dropout_p: Any,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: Any,
    use_separate_proj_weight: bool,
    q_proj_weight: Any,
    k_proj_weight: Any,
    v_proj_weight: Any,
    **options: Any,
) -> tuple[Any, Any]:
    """`F.multi_head_attention_forward` as the module's forward; its arguments are those of `functional_arguments`."""
    parameters = {
        "in_proj_weight": None if use_separate_proj_weight else in_proj_weight,
        "in_proj_bias": in_proj_bias,
        "out_proj.weight": out_proj_weight,
        "out_proj.bias": out_proj_bias,
        "q_proj_weight": q_proj_weight,
        "k_proj_weight": k_proj_weight,
        "v_proj_weight": v_proj_weight,
    }
    return _opened(parameters.__getitem__, num_heads, dropout_p, lambda: training, query, key, value, **options)


def open_multihead_attention(
    module: nn.MultiheadAttention,
    parameter: Any,
    training: Any,
    query: Any,
    key: Any,
    value: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """`nn.MultiheadAttention.forward` as projections around attention; its arguments and results.

    Args:
        parameter: name -> proxy of that parameter of the module, None where it has none.
        training: makes the proxy of the module's training flag; called where dropout needs it.
    """
    if not module.batch_first:
        return _opened(parameter, module.num_heads, module.dropout, training, query, key, value, *args, **kwargs)
    query, key, value = _sequence_first(query, key, value)
    result, weights = _opened(parameter, module.num_heads, module.dropout, training, query, key, value, *args, **kwargs)
    return result.movedim(0, -2), weights


def _opened(
    parameter: Any,
    heads: int,
    dropout: Any,
    training: Any,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: Any = False,
) -> tuple[Any, Any]:
    """Attention over (sequence, batch, width) with its projections."""
    query, key, value = _projections(parameter, heads, query, key, value)
    causal = False if need_weights else _follows_hint(query, is_causal, key_padding_mask)
    mask = None
    if (attn_mask is not None or key_padding_mask is not None) and causal is not True:
        mask = _call(merged_masks, query, attn_mask, key_padding_mask, heads, causal)
    never = isinstance(dropout, int | float) and dropout == 0
    dropout_p = 0.0 if never else _record(query, dropout_probability, training(), dropout)
    weights = None
    if need_weights:
        scores = torch.matmul(query * _call(softmax_scale, query), key.transpose(-2, -1))
        scores = scores if mask is None else _call(masked, scores, mask)
        probabilities = _dropped(_call(attention_probabilities, scores), dropout_p)
        result = torch.matmul(probabilities, value)
        weights = probabilities.mean(-3) if average_attn_weights else probabilities
    else:
        result = F.scaled_dot_product_attention(query, key, value, mask, dropout_p, causal)
    result = result.movedim(-2, 0).flatten(-2)
    return F.linear(result, parameter("out_proj.weight"), parameter("out_proj.bias")), weights


def _follows_hint(proxy: Any, is_causal: Any, key_padding_mask: Any) -> Any:
    if is_causal is False or (is_causal is True and key_padding_mask is None):
        return is_causal
    return _record(proxy, is_causal_alone, is_causal, key_padding_mask)


def is_causal_alone(is_causal: bool, key_padding_mask: Tensor | None) -> bool:
    """Whether the hint that a mask is the causal one takes its place: torch drops the hint beside a padding mask."""
    return bool(is_causal) and key_padding_mask is None


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores under an added mask."""
    return scores if mask is None else scores + mask


def _sequence_first(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """(batch, sequence, width) as (sequence, batch, width), torch's order of summing; one tensor once."""
    moved = {id(each): each.movedim(-2, 0) for each in (query, key, value)}
    return moved[id(query)], moved[id(key)], moved[id(value)]


def dropout_probability(training: bool, probability: float) -> float:
    """The dropout probability of the current mode: 0 outside training."""
    return probability if training else 0.0


def _projections(parameter: Any, heads: int, query: Any, key: Any, value: Any) -> tuple[Any, ...]:
    """Query, key and value by heads after their input projections; as in torch, one tensor is projected at once."""
    weight, bias = parameter("in_proj_weight"), parameter("in_proj_bias")
    if weight is None:
        weights = tuple(parameter(f"{letter}_proj_weight") for letter in "qkv")
    elif query is key and key is value:
        return _by_heads(F.linear(query, weight, bias), 3, heads)
    elif key is value:
        width = weight.size(-1)
        query_weight, weight = _parts(weight, width)
        query_bias, bias = (None, None) if bias is None else _parts(bias, width)
        projected = _call(by_heads, F.linear(query, query_weight, query_bias), heads)
        return projected, *_by_heads(F.linear(key, weight, bias), 2, heads)
    else:
        weights = _chunks(weight, 3, 0)
    biases = (None, None, None) if bias is None else _chunks(bias, 3, 0)
    operands = zip((query, key, value), weights, biases, strict=True)
    return tuple(_call(by_heads, F.linear(*each), heads) for each in operands)


def _by_heads(packed: Any, count: int, heads: int) -> tuple[Any, ...]:
    return tuple(each.unflatten(-1, (heads, -1)).movedim(0, -2) for each in _chunks(packed, count, -1))


def by_heads(projected: Tensor, heads: int) -> Tensor:
    """(sequence, ..., width) as (..., heads, sequence, width of a head), in torch's way: gradients are summed so."""
    if projected.dim() == 2:
        return by_heads(projected.unsqueeze(1), heads).squeeze(0)
    length, batch, width = projected.shape
    return projected.view(length, batch * heads, -1).transpose(0, 1).view(batch, heads, length, width // heads)


def _chunks(proxy: Any, count: int, axis: int) -> tuple[Any, ...]:
    chunks = proxy.chunk(count, axis)
    return tuple(chunks[index] for index in range(count))


def _parts(proxy: Any, width: Any) -> tuple[Any, Any]:
    """The query's part of a packed parameter, and that of key and value."""
    parts = proxy.split([width, 2 * width])
    return parts[0], parts[1]
