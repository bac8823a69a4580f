"""Squares of one parameter's individual gradients under several columns, by few products; on accelerators.

A sample's gradients under k columns are k products with the same inputs. One below the other, their left factors make
one product with k times the rows, which a GPU's matrix products are much faster at where a layer has few outputs. It is
written once and read once, to sum its squares.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.reductions import squares_of_first
from curvature_engine.rules import Rule

_ROWS = 1024
"""Of a product, from which more are no faster."""
_PRODUCT_BYTES = 2**29
"""Of the products of all samples at a time."""
_WITHOUT = {"cpu"}
"""Devices where caches count for more than the products' shapes."""


def fitting(contribution: ClosedForm) -> int:
    """How many columns are worth one product; 1 where the parameter is not for this form."""
    single = contribution.single()
    if single is None:
        return 1
    prepared, g, rule = single
    if g.device.type in _WITHOUT:
        return 1
    outputs = rule.by_position(prepared.use.role, g[:1])
    if outputs is None or not outputs.numel():
        return 1
    return max(1, min(_ROWS // outputs.shape[2], _PRODUCT_BYTES // max(1, _product_bytes(contribution))))


def working_bytes(contribution: ClosedForm, columns: int) -> int:
    """What `stacked_squares` of so many columns holds beside them."""
    _, g, _ = _only(contribution)
    return columns * (_product_bytes(contribution) + g[: contribution.block].nbytes) + contribution.working_bytes()


def _product_bytes(contribution: ClosedForm) -> int:
    """Of one column's gradients of a block of samples."""
    _, g, _ = _only(contribution)
    return contribution.block * contribution.numel * g.element_size()


def _only(contribution: ClosedForm) -> tuple[PreparedUse, Tensor, Rule]:
    single = contribution.single()
    assert single is not None
    return single


def stacked_squares(columns: Sequence[ClosedForm]) -> Tensor:
    """Σ over columns and samples of g², [*p], of contributions of one operator for which `fitting` is more than 1."""
    first = columns[0]
    prepared, _, rule = _only(first)
    role, sums = prepared.use.role, list[Tensor]()
    for start in range(0, first.N, first.block):
        pairs = first.factors(start)
        assert pairs is not None
        stack = torch.stack([_by_output(column, start) for column in columns], 1)  # [n, k, out, P]
        n, k, out, P = stack.shape
        for piece, factors in enumerate(pairs):
            rows = factors[0 if rule.inputs_first else 1]  # [n, P, in]
            product = torch.bmm(stack.view(n, k * out, P), rows)
            found = squares_of_first(product.view(n, k, out, -1), 2)
            found = found.T if rule.inputs_first else found
            if piece == len(sums):
                sums.append(found)
            else:
                sums[piece].add_(found)
    return rule.assemble(role, sums)


def _by_output(column: ClosedForm, start: int) -> Tensor:
    """The outputs' gradients of a block of samples, [n, out, P]."""
    prepared, g, rule = _only(column)
    found = rule.by_position(prepared.use.role, g[start : start + column.block])
    assert found is not None
    return found.mT
