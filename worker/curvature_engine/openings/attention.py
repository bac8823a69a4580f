"""Attention's fused operators: the fast paths that inference takes, and the scaled dot product."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from curvature_engine.openings.base import Elementary, aten

_KEY_PADDING = 1
"""The mask is [N, keys]; every other kind broadcasts against [N, heads, queries, keys]."""


def open_scaled_attention(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """softmax(q kᵀ / √d + mask) v, where a parameter comes in: a bias of relative positions given as the mask."""
    q, k, v, mask, dropout, causal, scale, grouped = _completed(arguments, (None, 0.0, False, None, False), 8)
    if dropout > 0:
        return None
    if grouped:
        k, v = (
            ops.call(aten.repeat_interleave.self_int, t, q.shape[-3] // t.shape[-3], t.dim() - 3, output_size=None)
            for t in (k, v)
        )
    scores = ops.scale(ops.matmul(q, ops.transpose(k, -2, -1)), 1 / sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = ops.call(aten.masked_fill.Scalar, scores, later, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = ops.call(aten.masked_fill.Scalar, scores, ~mask, -torch.inf)
    elif mask is not None:
        scores = ops.add(scores, mask)
    return ops.matmul(ops.softmax(scores), v)


def open_multi_head_attention(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`_native_multi_head_attention`: (output [N, queries, E], weights)."""
    query, key, value, embed, heads, w_in, b_in, w_out, b_out = arguments[:9]
    mask, need_weights, average, kind = _completed(arguments, (None, True, True, None), 13)[9:]
    if query.is_nested:
        return None
    q, k, v = (_heads(ops, t, heads) for t in _projected(ops, query, key, value, embed, w_in, b_in))
    scores = ops.scale(ops.matmul(q, ops.transpose(k, -2, -1)), 1 / sqrt(embed // heads))
    if mask is not None:
        hidden = mask[:, None, None] if kind == _KEY_PADDING else mask
        scores = ops.call(aten.masked_fill.Scalar, scores, hidden.bool(), -torch.inf)
    weights = ops.softmax(scores)
    output = ops.transpose(ops.matmul(weights, v), 1, 2)
    output = ops.linear(ops.reshape(output, (*output.shape[:2], embed)), w_out, b_out)
    if not need_weights:
        return output, output.new_empty(0)
    return output, (ops.call(aten.mean.dim, weights, [1]) if average else weights)


def open_encoder_layer(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`_transformer_encoder_layer_fwd`: attention and two linear layers, normalised before or after each."""
    x, embed, heads, w_in, b_in, w_out, b_out, gelu, norm_first, eps = arguments[:10]
    norms, (w_1, b_1, w_2, b_2) = (arguments[10:12], arguments[12:14]), arguments[14:18]
    mask, kind = (*arguments[18:], None, None)[:2]
    if x.is_nested:
        return None

    def normalised(x: Tensor, which: int) -> Tensor:
        normal: Tensor = ops.call(aten.layer_norm.default, x, [embed], *norms[which], eps, False)
        return normal

    def attended(x: Tensor) -> Tensor:
        given = (x, x, x, embed, heads, w_in, b_in, w_out, b_out, mask, False, True, kind)
        output: Tensor = open_multi_head_attention(ops, given)[0]
        return output

    def transformed(x: Tensor) -> Tensor:
        return ops.linear(ops.apply("gelu" if gelu else "relu", ops.linear(x, w_1, b_1)), w_2, b_2)

    if norm_first:
        x = ops.add(x, attended(normalised(x, 0)))
        return ops.add(x, transformed(normalised(x, 1)))
    x = normalised(ops.add(x, attended(x)), 0)
    return normalised(ops.add(x, transformed(x)), 1)


def _completed(arguments: Sequence[Any], defaults: Sequence[Any], count: int) -> tuple[Any, ...]:
    """The arguments with their schema's defaults after them, `count` in all."""
    missing = count - len(arguments)
    return (*arguments, *defaults[len(defaults) - missing :])


def _projected(
    ops: Elementary, query: Tensor, key: Tensor, value: Tensor, embed: int, weight: Tensor, bias: Tensor
) -> list[Tensor]:
    """Queries, keys and values; one product where all three come from the same tensor."""
    if query is key and key is value:
        return ops.chunk(ops.linear(query, weight, bias), 3, -1)
    return [
        ops.linear(x, ops.narrow(weight, 0, i * embed, embed), ops.narrow(bias, 0, i * embed, embed))
        for i, x in enumerate((query, key, value))
    ]


def _heads(ops: Elementary, x: Tensor, heads: int) -> Tensor:
    """[N, T, E] → [N, heads, T, E/heads]."""
    return ops.transpose(ops.reshape(x, (*x.shape[:2], heads, -1)), 1, 2)
