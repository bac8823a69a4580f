"""Squares of individual gradients summed over columns, in the forms in which they come: made whole once, at the end."""

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.reductions import Assemble, Outer
from curvature_engine.stacked import Stacked


class SquaredOuters:
    """Σ over the columns of one part of the samples, by parameter, for those whose gradients are outer products.

    Σ_v (a ⊗ b_v)² = a² ⊗ Σ_v b_v²: of a layer that sees one row a sample, the columns cost no products until the last.
    """

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

    def take_stacked(self, parameter: str, stacked: Stacked) -> bool:
        """Add several columns'; False where the gradients are no outer products."""
        outer = stacked.outer()
        if outer is None:
            return False
        column = outer.column.view(stacked.k, stacked.N, -1).square().sum(0)
        if parameter in self._squares:
            self._squares[parameter].column.add_(column)
        else:
            self._squares[parameter] = Outer(outer.kept.square(), column, outer.turned)
        return True

    def release(self) -> dict[str, Outer]:
        """What there is, which is forgotten."""
        found, self._squares = self._squares, {}
        return found


class SquaredPieces:
    """Σ over columns and samples, by parameter, for those whose gradients are made in pieces."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[list[Tensor], Assemble]] = {}
        self._others: set[str] = set()

    def take(self, parameter: str, contribution: Contribution) -> bool:
        """Add a column's; False where there is a shorter way to the sum of squares."""
        if parameter in self._others:
            return False
        shorter = parameter not in self._sums and contribution.is_reduced("sum_squared")
        found = None if shorter else contribution.squares_in_pieces()
        if found is None:
            self._others.add(parameter)
            return False
        if parameter not in self._sums:
            self._sums[parameter] = found
        else:
            for total, piece in zip(self._sums[parameter][0], found[0], strict=True):
                total.add_(piece)
        return True

    def release(self) -> dict[str, Tensor]:
        """What there is, [*p] each, which is forgotten."""
        sums, self._sums = self._sums, {}
        self._others.clear()
        return {parameter: assemble(pieces) for parameter, (pieces, assemble) in sums.items()}
