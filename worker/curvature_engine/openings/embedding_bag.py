"""Embedding bags: rows of a table, summed or averaged by bag."""

from collections.abc import Sequence
from typing import Any

import torch

from curvature_engine.openings.base import Elementary, aten

_SUM, _MEAN = 0, 1


def open_embedding_bag(ops: Elementary, arguments: Sequence[Any]) -> Any:
    """`embedding_bag(W, indices, offsets, scale_grad_by_freq, mode, sparse, weights, last offset, padding)`."""
    weight, indices, offsets = arguments[:3]
    defaults: tuple[Any, ...] = (False, _SUM, False, None, False, None)
    _, mode, _, per_index, include_last, padding = (*arguments[3:], *defaults[len(arguments) - 3 :])
    if mode not in (_SUM, _MEAN) or indices.dim() != 1 or (padding is not None and padding >= 0):
        return None
    offsets = offsets[:-1] if include_last else offsets
    bags = torch.bucketize(torch.arange(len(indices), device=indices.device), offsets, right=True) - 1
    rows = ops.call(aten.embedding.default, weight, indices)
    if per_index is not None:
        rows = ops.mul(rows, ops.call(aten.unsqueeze.default, per_index, 1))
    empty = rows.new_zeros(len(offsets), weight.shape[1])
    output = ops.call(aten.index_add.default, empty, 0, bags, rows)
    counts = torch.bincount(bags, minlength=len(offsets))
    if mode == _MEAN:
        output = ops.mul(output, counts.clamp(min=1).to(output.dtype).reciprocal()[:, None])
    return output, bags, counts, counts.new_empty(0)
