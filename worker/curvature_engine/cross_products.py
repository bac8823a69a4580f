"""Inner products of two batches' individual gradients, ⟨g_n, g′_m⟩ for all pairs, by the forms of `dot_products`.

The batches may differ in their numbers of samples N, N′ and of rows per sample T, T′ (a sequence's length, an image's
positions). In Gram form a pair costs T·T′·(in + out).
"""

import math

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Absent, Contribution
from curvature_engine.dot_products import gram_factors, groups_of, row_pairs


def cross_products(left: Contribution, N: int, right: Contribution, N_other: int, budget_bytes: int) -> Tensor:
    """⟨g_n, g′_m⟩, [N, N′], by whichever form is cheaper."""
    if isinstance(left, Absent) or isinstance(right, Absent):
        absent = left if isinstance(left, Absent) else right
        return next(iter(absent.blocks()))[1].new_zeros(N, N_other)
    found = _by_gram(left, N, right, N_other, budget_bytes)
    return _by_blocks(left, N, right, N_other, budget_bytes) if found is None else found


def cross_costs(left: Contribution, N: int, right: Contribution, N_other: int) -> tuple[str, int]:
    """(form, multiply-adds) of all pairs' inner products."""
    if (sizes := _gram_sizes(left, right)) is not None:
        groups, rows, features = sizes
        return "gram", N * N_other * groups * rows * (features + 1)
    return "materialised", left.multiply_adds() + right.multiply_adds() + N * N_other * math.prod(left.shape)


def _by_blocks(left: Contribution, N: int, right: Contribution, N_other: int, budget_bytes: int) -> Tensor:
    """Materialised, a group of the one batch against blocks of the other, which are made again per group."""
    products: Tensor | None = None
    for first, group in groups_of(left, budget_bytes // 2):
        for start, block in right.blocks():
            one, other = _of_one_dtype(group, block.reshape(len(block), -1))
            if products is None:
                products = one.new_zeros(N, N_other)
            products[first : first + len(one), start : start + len(other)] = one @ other.T
    assert products is not None
    return products


def _by_gram(left: Contribution, N: int, right: Contribution, N_other: int, budget_bytes: int) -> Tensor | None:
    """The Gram form; None where there is none, or where it costs more."""
    sizes = _gram_sizes(left, right)
    if sizes is None:
        return None
    assert isinstance(left, ClosedForm)
    assert isinstance(right, ClosedForm)
    groups, rows, _ = sizes
    side = max(1, math.isqrt(budget_bytes // max(1, 3 * groups * rows * torch.float64.itemsize)))
    products: Tensor | None = None
    for i in range(0, N, side):
        x, s = _factors(left, slice(i, i + side))
        for j in range(0, N_other, side):
            y, r = _factors(right, slice(j, j + side))
            part = (row_pairs(*_of_one_dtype(x, y)) * row_pairs(*_of_one_dtype(s, r))).sum((0, 2, 4))
            if products is None:
                products = part.new_zeros(N, N_other)
            products[i : i + side, j : j + side] = part
    return products


def _factors(contribution: ClosedForm, block: slice) -> tuple[Tensor, Tensor]:
    found = gram_factors(contribution, block)
    assert found is not None
    return found


def _gram_sizes(left: Contribution, right: Contribution) -> tuple[int, int, int] | None:
    """(groups, T·T′, in + out) of a pair in Gram form; None where there is none, or where it costs more."""
    if not isinstance(left, ClosedForm) or not isinstance(right, ClosedForm):
        return None
    one, other = gram_factors(left, slice(0, 1)), gram_factors(right, slice(0, 1))
    if one is None or other is None or (one[0].shape[0], one[0].shape[3]) != (other[0].shape[0], other[0].shape[3]):
        return None
    (groups, _, T, n_in), n_out, T_other = one[0].shape, one[1].shape[3], other[0].shape[2]
    if T * T_other * (n_in + n_out) >= n_in * n_out:
        return None
    return groups, T * T_other, n_in + n_out


def _of_one_dtype(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.to(dtype), other.to(dtype)
