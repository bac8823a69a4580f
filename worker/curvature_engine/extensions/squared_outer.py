"""Squares of outer products, summed over columns before they are multiplied out.

Σ_v (a ⊗ b_v)² = a² ⊗ Σ_v b_v²: of a layer that sees one row a sample, the columns cost no products until the last.
"""

from curvature_engine.contributions import Contribution
from curvature_engine.reductions import Outer


class SquaredOuters:
    """Σ over the columns of one part of the samples, by parameter, for those whose gradients are outer products."""

    def __init__(self) -> None:
        self._squares: dict[str, Outer] = {}

    def take(self, parameter: str, contribution: Contribution) -> bool:
        """Add a column's; False where the gradients are no outer products."""
        outer = contribution.outer()
        if outer is None:
            return False
        before = self._squares.get(parameter)
        if before is None:
            self._squares[parameter] = outer.squared()
        else:
            before.column.addcmul_(outer.column, outer.column)
        return True

    def release(self) -> dict[str, Outer]:
        """What there is, which is forgotten."""
        found, self._squares = self._squares, {}
        return found
