"""Squares of one parameter's individual gradients under column after column, on CPUs, summed over samples or not.

What the columns have in common is kept, above all what the rule made of the inputs. So of a column little is left
beside the products with it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.kernels import choice
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.reductions import SumSquared
from curvature_engine.rules import Rule
from curvature_engine.tiles import assemble, pay, reduce_tiles

_NEAR_BYTES = 2**22
"""Of a piece of all samples' gradients: larger ones are summed over the samples column by column."""
_HOT_BYTES = 2**20
"""Of gradients that are squared while they lie in a core's cache."""


class ColumnSquares:
    """Σ over columns and samples of g², of a parameter whose gradients are products with something of its inputs.

    Args:
        use: the parameter's only one.
        inputs: the factor of the inputs, by piece, [N, P, in].
        like: the parameter.
    """

    def __init__(self, use: PreparedUse, inputs: list[Tensor], like: Tensor) -> None:
        assert use.tap.rule is not None
        self._rule: Rule = use.tap.rule
        self._role, self._inputs, self._like = use.use.role, inputs, like
        self._turned, self._tiled = self._rule.inputs_first, pay(like)
        self._sums = SumSquared()

    @classmethod
    def of(cls, contribution: ClosedForm) -> "ColumnSquares | None":
        """For contributions like this; None where they are no such products, or what they share cannot be kept."""
        single = contribution.single()
        if single is None or not contribution.like.is_cpu or choice.is_for_kernels(single[1]):
            return None
        use, _, rule = single
        pairs = contribution.kept_factors()
        if pairs is None:
            return None
        return cls(use, [pair[0 if rule.inputs_first else 1] for pair in pairs], contribution.like)

    def add(self, g: Tensor) -> None:
        """Add the squares of some columns, whose gradients of the operator's output are g [k·N, T, …].

        What lacks memory raises it: a part may have been added.
        """
        outputs = self._rule.by_position(self._role, g)
        assert outputs is not None  # as there were factors
        N = len(self._inputs[0])
        columns = outputs.view(len(g) // N, N, *outputs.shape[1:]).unbind()
        if self._tiled:
            for column in columns:
                reduce_tiles(0, [self._pair(column, x) for x in self._inputs], [self._sums])
            return
        for piece, x in enumerate(self._inputs):
            self._add_piece(piece, [self._pair(column, x) for column in columns])

    def _pair(self, column: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, column) if self._turned else (column, x)

    def _add_piece(self, piece: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Add the squares of products of left [N, P, a] and right [N, P, b]."""
        left, right = pairs[0]
        # Transposed: MKL takes up to a third less for that, where b is small.
        product = left.new_empty((len(left), right.shape[2], left.shape[2]))
        if len(pairs) == 1 or product.nbytes > _NEAR_BYTES:
            for left, right in pairs:
                self._sums.add(0, piece, torch.bmm(right.mT, left, out=product).mT)
            return
        # By sample, in calls that threads can share: then over the samples, once for all columns.
        squares = torch.bmm(right.mT, left, out=product).square()
        for left, right in pairs[1:]:
            torch.bmm(right.mT, left, out=product)
            squares.addcmul_(product, product)
        self._sums.add_to(piece, squares.sum(0).mT)

    def total(self) -> Tensor:
        """What there is, [*p]."""
        return assemble(self._rule, self._role, self._like.shape[0], self._sums.pieces)


class SampleSquares:
    """Σ over columns of each sample's g², of such a parameter.

    Args:
        use: the parameter's only one.
        inputs: the factor of the inputs, whole, [N, P, in].
        like: the parameter.
    """

    def __init__(self, use: PreparedUse, inputs: Tensor, like: Tensor) -> None:
        assert use.tap.rule is not None
        self._rule: Rule = use.tap.rule
        self._role, self._inputs, self._like = use.use.role, inputs, like
        self._product: Tensor | None = None

    @classmethod
    def of(cls, contribution: ClosedForm, *, most_bytes: int | None = None) -> "SampleSquares | None":
        """For contributions like this; None where they are no such products, or what they share cannot be kept.

        None, too, where it would take more than `most_bytes`.
        """
        single = contribution.single()
        inputs = contribution.kept_windows(most_bytes) if contribution.like.is_cpu else None
        return None if single is None or inputs is None else cls(single[0], inputs, contribution.like)

    def squares(self, g: Tensor) -> Tensor:
        """Those of some columns, whose gradients of the operator's output are g [k·N, T, …]: [N, *p]."""
        outputs = self._rule.by_position(self._role, g)
        assert outputs is not None  # as it was of the first
        N = len(self._inputs)
        total: Tensor | None = None
        for column in outputs.view(len(g) // N, N, *outputs.shape[1:]).unbind():
            product = self._multiply(column, 0)
            total = product.square() if total is None else total.addcmul_(product, product)
        assert total is not None
        return total.view(N, *self._like.shape)

    def gradients(self, g: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first sample, gradients [n, *p], which the next overwrite) of one column, block by block.

        Its gradients of the operator's output are g [N, T, …].
        """
        outputs = self._rule.by_position(self._role, g)
        assert outputs is not None
        # As many for every thread: they share samples.
        size = torch.get_num_threads() * max(1, _HOT_BYTES // max(1, self._like.numel() * g.element_size()))
        for first in range(0, len(g), size):
            product = self._multiply(outputs[first : first + size], first)
            yield first, product.view(len(product), *self._like.shape)

    def _multiply(self, column: Tensor, first: int) -> Tensor:
        """Of outputs' gradients by position, [n, P, out], of the samples from `first` on."""
        inputs = self._inputs[first : first + len(column)]
        left, right = (inputs, column) if self._rule.inputs_first else (column, inputs)
        if self._product is None:
            self._product = torch.bmm(left.mT, right)
            return self._product
        return torch.bmm(left.mT, right, out=self._product[: len(column)])
