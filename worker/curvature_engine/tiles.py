"""Individual gradients that are products, a tile of the parameter at a time: for sums over samples, on CPUs.

A large layer's gradient of one sample leaves a core's own cache before it is reduced, and so does the sum that it goes
to. So some rows of it are made of all samples, one after another, in a buffer that each overwrites, before the next
rows are: buffer and sums stay where they are fastest.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.rules import Rule

_TILE_BYTES = 2**19
"""Of one sample's tile: with two sums of its size, half of what two cores' own caches hold."""
_LEAST_BYTES = 2**20
"""Of a parameter: what is smaller stays in the cache as it is."""
_BUFFER_BYTES = 2**20
"""Of the tiles that one call of the library makes."""


def pay(like: Tensor) -> bool:
    """Whether a consumed tensor is so large that its gradients are best made in tiles."""
    return like.device.type == "cpu" and like.numel() * like.element_size() > _LEAST_BYTES


def tiles(first: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[int, int, Tensor]]:
    """(first sample, number of the tile, [n, rows, b]): every tile of all samples before the next.

    Args:
        first: the number of the first sample.
        pairs: the factors l [N, T, a], r [N, T, b] of every piece [N, a, b] = Σ_t l rᵀ.
    """
    number = 0
    for left, right in pairs:
        N, _, a = left.shape
        b = right.shape[2]
        rows = _rows(a, b * right.element_size())
        size = max(1, min(N, _BUFFER_BYTES // (rows * b * right.element_size())))
        buffer = right.new_empty(size * rows * b)
        for top in range(0, a, rows):
            part = left[:, :, top : top + rows].mT
            for start in range(0, N, size):
                some, others = part[start : start + size], right[start : start + size]
                tile = buffer[: len(some) * some.shape[1] * b].view(len(some), some.shape[1], b)
                yield first + start, number, torch.bmm(some, others, out=tile)
            number += 1


def assemble(rule: Rule, role: str, height: int, found: list[Tensor]) -> Tensor:
    """Something of every tile, [rows, …], as a tensor of the consumed one's shape.

    Args:
        rule: that made them.
        role: of the consumed tensor.
        height: rows of a piece.
        found: whole pieces, or all their tiles.
    """
    rows = found[0].shape[0] if found[0].dim() else height
    if 0 < rows < height:
        per_piece = -(-height // rows)
        found = [_joined(found[i : i + per_piece]) for i in range(0, len(found), per_piece)]
    return rule.assemble(role, found)


def _joined(parts: list[Tensor]) -> Tensor:
    """One below the other."""
    rows = sum(len(part) for part in parts)
    return torch.cat(parts, out=pages.blank((rows, *parts[0].shape[1:]), parts[0]))


def _rows(a: int, row_bytes: int) -> int:
    """How many of a piece's rows make a tile: all, or a power of two."""
    fitting = max(1, _TILE_BYTES // row_bytes)
    return a if a <= fitting else 1 << (fitting.bit_length() - 1)
