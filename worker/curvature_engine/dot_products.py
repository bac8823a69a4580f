"""Inner products of individual gradients, ⟨g_n, g_m⟩ for all pairs of samples, without writing the gradients out.

Gram form: with G_n = Σ_t s_nt x_ntᵀ (a linear layer; a convolution on patches), ⟨G_n, G_m⟩ = Σ_{t,u} ⟨s_nt, s_mu⟩
⟨x_nt, x_mu⟩ (Goodfellow 2015, extended to rows and pairs). Per pair it costs T²(in + out) in place of in·out.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Contribution


def dot_products(contribution: Contribution, N: int, budget_bytes: int) -> Tensor:
    """⟨g_n, g_m⟩, [N, N], by whichever form is cheaper."""
    found = _by_gram(contribution, N, budget_bytes) if isinstance(contribution, ClosedForm) else None
    return _by_blocks(contribution, N, budget_bytes) if found is None else found


def _by_blocks(contribution: Contribution, N: int, budget_bytes: int) -> Tensor:
    """Materialised, a group of samples against blocks: gradients that exceed the budget are made again per group."""
    products: Tensor | None = None
    for first, group in groups_of(contribution, budget_bytes // 2):
        rows = slice(first, first + len(group))
        if products is None:
            products = group.new_zeros(N, N)
        products[rows, rows] = group @ group.T
        for start, block in contribution.blocks(rows.stop):
            columns = slice(start, start + len(block))
            part = group @ block.reshape(len(block), -1).T
            products[rows, columns] = part
            products[columns, rows] = part.T
    assert products is not None
    return products


def groups_of(contribution: Contribution, limit_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """(first sample, gradients [n, P]): as many blocks together as fit the limit, at least one."""
    held: list[Tensor] = []
    first = 0
    for start, block in contribution.blocks():
        flat = block.reshape(len(block), -1)
        if held and sum(h.nbytes for h in held) + flat.nbytes > limit_bytes:
            yield first, torch.cat(held)
            held, first = [], start
        held.append(flat)
    yield first, torch.cat(held)


def _by_gram(contribution: ClosedForm, N: int, budget_bytes: int) -> Tensor | None:
    """The Gram form; None where there is none, or where it costs more."""
    one = gram_factors(contribution, slice(0, 1))
    if one is None:
        return None
    x, s = one
    groups, _, T, _ = x.shape
    if not _gram_is_cheaper(x, s):
        return None
    pair_bytes = max(1, 3 * groups * T * T * x.element_size())
    side = max(1, min(N, math.isqrt(budget_bytes // pair_bytes)))
    products = s.new_zeros(N, N)
    for i in range(0, N, side):
        left = gram_factors(contribution, slice(i, i + side))
        for j in range(i, N, side):
            right = left if i == j else gram_factors(contribution, slice(j, j + side))
            assert left is not None
            assert right is not None
            part = (row_pairs(left[0], right[0]) * row_pairs(left[1], right[1])).sum((0, 2, 4))
            products[i : i + side, j : j + side] = part
            products[j : j + side, i : i + side] = part.T
    return products


def costs(contribution: Contribution, N: int) -> tuple[str, int]:
    """(form, multiply-adds) of all pairs' inner products."""
    one = gram_factors(contribution, slice(0, 1)) if isinstance(contribution, ClosedForm) else None
    if one is not None and _gram_is_cheaper(*one):
        (groups, _, T, n_in), n_out = one[0].shape, one[1].shape[3]
        return "gram", N * (N + 1) // 2 * groups * T * T * (n_in + n_out + 1)
    return "materialised", contribution.multiply_adds() + N * (N + 1) // 2 * math.prod(contribution.shape)


def _gram_is_cheaper(x: Tensor, s: Tensor) -> bool:
    T, n_in, n_out = x.shape[2], x.shape[3], s.shape[3]
    return T * T * (n_in + n_out) < n_in * n_out


def gram_factors(contribution: ClosedForm, block: slice) -> tuple[Tensor, Tensor] | None:
    """X and s of one weight's only use, [groups, n, T, in] and [groups, n, T, out]."""
    single = contribution.single()
    if single is None or single[0].use.role != "weight":
        return None
    prepared, g, rule = single
    x = rule.factor_inputs(tuple(t[block] for t in prepared.saved))
    s = rule.factor_outputs("weight", g[block])
    return None if x is None or s is None else (x, s)


def row_pairs(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of all rows: [groups, n, T, d] and [groups, m, U, d] → [groups, n, T, m, U]."""
    product = torch.bmm(left.flatten(1, 2), right.flatten(1, 2).transpose(1, 2))
    return product.view(len(left), *left.shape[1:3], *right.shape[1:3])
