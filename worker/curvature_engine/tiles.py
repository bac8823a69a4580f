"""Individual gradients that are products, a tile of the parameter at a time: for sums over samples, on CPUs.

A large layer's gradient of one sample leaves the caches before it is reduced, and so does the sum that it goes to. So
some rows of it are made of all samples, one after another, in a buffer that each overwrites, before the next rows are:
buffer and sums stay close by.
"""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.matrix_products import product_of_columns
from curvature_engine.reductions import Reduction
from curvature_engine.rules import Rule

_TILE_BYTES = 2**22
"""Of one sample's tile: with one sum of its size, far from what caches hold that cores share. From 1 to 8 MiB a sum of
squares takes the same time within a tenth (32 samples, 512 x 1536 from 16 positions)."""
_LEAST_BYTES = 2**20
"""Of a parameter: what is smaller stays in the cache as it is."""
_TURNED_BYTES = 2**25
"""Of a piece from which sums of it are not held twice, by columns and as they are returned."""


def pay(like: Tensor) -> bool:
    """Whether a consumed tensor is so large that its gradients are best made in tiles."""
    return like.is_cpu and like.numel() * like.element_size() > _LEAST_BYTES


def reduce_tiles(first: int, pairs: Iterable[tuple[Tensor, Tensor]], reductions: Collection[Reduction]) -> None:
    """Show reductions every tile of all samples before the next.

    Args:
        first: the number of the first sample.
        pairs: the factors l [N, T, a], r [N, T, b] of every piece [N, a, b] = Σ_t l rᵀ.
        reductions: to which a tile [rows, b] is a piece.
    """
    number = 0
    for left, right in pairs:
        a, b = left.shape[2], right.shape[2]
        rows = _rows(a, b * right.element_size())
        buffer, others = _buffer(rows, a, b, right), right.unbind()
        for top in range(0, a, rows):
            part = left[:, :, top : top + rows]
            tile = buffer[: part.shape[2]]
            takers = [reduction.taker(number, tile) for reduction in reductions]
            for sample, (some, other) in enumerate(zip(part.unbind(), others, strict=True), first):
                product_of_columns(some, other, tile)
                for take in takers:
                    take(sample, tile)
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


def _buffer(rows: int, a: int, b: int, like: Tensor) -> Tensor:
    """For tiles [rows, b] of [a, b]: by columns where these are longer, unless the sum would take much room to turn."""
    if rows >= b or a * b * like.element_size() >= _TURNED_BYTES:
        return like.new_empty((rows, b))
    return like.new_empty((b, rows)).mT


def _rows(a: int, row_bytes: int) -> int:
    """How many of a piece's rows make a tile: all, or a power of two."""
    fitting = max(1, _TILE_BYTES // row_bytes)
    return a if a <= fitting else 1 << (fitting.bit_length() - 1)
