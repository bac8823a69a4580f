"""What the Kronecker factors are sums of, over the layers that use a parameter: inputs x and columns s."""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.rules import Rule
from curvature_engine.rules.gram import Gram, gram_multiply_adds

# Inputs


def positions(prepared: PreparedUse) -> int:
    """How many inputs a layer has, of all samples."""
    return prepared.attribution.R * _rule(prepared).input_positions(prepared.saved)


def summed_moment(uses: Sequence[PreparedUse], budget_bytes: int, *, joint: bool, factor: float = 1) -> Tensor:
    """Σ x xᵀ over all positions times a factor, [groups, in, in]; `joint` with the bias's factor after x."""
    total: Tensor | None = None
    for prepared in uses:
        rule = _rule(prepared)
        A = rule.scaled_input_moment(prepared.saved, budget_bytes, factor)
        assert A is not None
        if joint:
            sums = _sums(prepared, budget_bytes).sum(1) * (factor * rule.bias_scale)
            A = _bordered(A, sums, positions(prepared) * factor * rule.bias_scale**2)
        total = A if total is None else total.add_(A)
    assert total is not None
    return total


def averaged_moment(uses: Sequence[PreparedUse], budget_bytes: int, *, joint: bool, factor: float = 1) -> Tensor:
    """Σ x̄ x̄ᵀ over samples times a factor, [groups, in, in], of the averages over a sample's positions.

    Each sample has as many.
    """
    rows = sum(positions(p) for p in uses)
    x = _sums(uses[0], budget_bytes)  # [groups, n, in]
    for prepared in uses[1:]:
        x = x + _sums(prepared, budget_bytes)
    if rows != x.shape[1]:
        x = x * (x.shape[1] / rows)
    if joint:
        one = sum(positions(p) * _rule(p).bias_scale for p in uses) / rows
        x = torch.cat([x, x.new_full((*x.shape[:2], 1), one)], dim=2)
    total = Gram(x.shape[0], x.shape[2], x.shape[1], x, factor)
    total.add(x)
    return total.finish()


def cost_of_inputs(uses: Sequence[PreparedUse], budget_bytes: int, *, averaged: bool) -> tuple[int, int]:
    """Multiplications and additions for A, from shapes alone, and the bytes that it takes beside the result."""
    if averaged:
        one = _rule(uses[0]).input_sums([s[:1] for s in uses[0].saved], budget_bytes)
        assert one is not None
        groups, _, width = one.shape
        n, numbers = len(uses[0].saved[0]), sum(s.numel() for p in uses for s in p.saved)
        return gram_multiply_adds(groups, width, n, one.device) + numbers, 2 * n * one.nbytes
    costs = [_rule(p).input_moment_cost(p.saved, budget_bytes) for p in uses]
    return sum(products for products, _ in costs), max(working for _, working in costs)


def _sums(prepared: PreparedUse, budget_bytes: int) -> Tensor:
    """Σ x over each sample's positions, [groups, n, in]."""
    found = _rule(prepared).input_sums(prepared.saved, budget_bytes)
    assert found is not None
    return found


def _bordered(A: Tensor, sums: Tensor, count: float) -> Tensor:
    """Σ (x, b)(x, b)ᵀ from Σ x xᵀ [groups, in, in], b Σ x [groups, in] and Σ b²."""
    groups, width = sums.shape
    result = A.new_empty(groups, width + 1, width + 1)
    result[:, :width, :width] = A
    result[:, :width, width] = result[:, width, :width] = sums
    result[:, width, width] = count
    return result


# Columns


def columns_of_one_sample(contribution: ClosedForm) -> list[Tensor]:
    """The first sample's columns s of every use, [groups, 1, positions, out]."""
    found = [_rule(p).factor_outputs(p.use.role, g[:1]) for p, g in contribution.uses]
    return [s for s in found if s is not None]


def summed_columns(contribution: ClosedForm) -> Tensor:
    """Columns summed over every sample's positions, [groups, n, out]."""
    total: Tensor | None = None
    for prepared, g in contribution.uses:
        s = _rule(prepared).output_sums(prepared.use.role, g)
        assert s is not None
        total = s if total is None else total + s
    assert total is not None
    return total


def _rule(prepared: PreparedUse) -> Rule:
    assert prepared.tap.rule is not None
    return prepared.tap.rule
