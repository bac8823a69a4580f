"""Squares of individual gradients summed over columns, in the forms in which they come: made whole once, at the end."""

from collections.abc import Iterator

from torch import Tensor

from curvature_engine import position_pairs
from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Contribution
from curvature_engine.position_pairs import PositionPairs
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


_HELD_BYTES = 2**25
"""Of one parameter's columns that wait to be squared together."""


class WaitingColumns:
    """The columns of one part of the samples, by parameter, for those that `PositionPairs` squares together.

    Args:
        columns: how many will come.
        room_bytes: for all that wait; what finds none is squared column by column.
    """

    def __init__(self, columns: int, room_bytes: int) -> None:
        self._columns, self._room, self._left = columns, room_bytes, room_bytes
        self._waiting: dict[str, list[ClosedForm]] = {}
        self._most: dict[str, int] = {}
        """How many columns of a parameter wait at a time; 0 where it is not for this form."""

    def take(self, parameter: str, contribution: Contribution) -> bool:
        """Add a column's; False where it is to be squared by itself."""
        if not isinstance(contribution, ClosedForm):
            return False
        if parameter not in self._most:
            self._most[parameter] = most = self._fitting(contribution, self._left)
            self._left -= most * _held_bytes(contribution)
        if not self._most[parameter]:
            return False
        self._waiting.setdefault(parameter, []).append(contribution)
        return True

    def full(self, parameter: str) -> bool:
        """Whether no more of its columns can wait."""
        return len(self._waiting[parameter]) >= self._most[parameter]

    def release(self, parameter: str) -> list[ClosedForm]:
        """What waits of a parameter, which is forgotten."""
        return self._waiting.pop(parameter)

    def release_all(self) -> Iterator[tuple[str, list[ClosedForm]]]:
        """What waits, parameter by parameter, which is forgotten."""
        for parameter in list(self._waiting):
            yield parameter, self._waiting.pop(parameter)
        self._most.clear()
        self._left = self._room

    def foreseen(self, contribution: Contribution) -> tuple[int, int]:
        """What squares of a parameter's columns cost, and what waits for it; (0, 0) where it is not for this form."""
        if not isinstance(contribution, ClosedForm) or not (most := self._fitting(contribution, self._room)):
            return 0, 0
        times = -(-self._columns // most)
        return times * position_pairs.multiply_adds(contribution), most * _held_bytes(contribution)

    def _fitting(self, contribution: ClosedForm, room_bytes: int) -> int:
        if contribution.single() is None:
            return 0
        most = min(self._columns, min(_HELD_BYTES, room_bytes) // max(1, _held_bytes(contribution)))
        return most if most > 1 and position_pairs.pay(contribution, most) else 0


def squares(waiting: list[ClosedForm]) -> Tensor:
    """Σ over columns and samples of the squared gradients of a parameter, [*p]."""
    found = PositionPairs(waiting).sum_of_squares()
    if found is None:
        found = waiting[0].sum_squared()
        for contribution in waiting[1:]:
            found.add_(contribution.sum_squared())
    return found


def _held_bytes(contribution: ClosedForm) -> int:
    return sum(g.numel() * g.element_size() for _, g in contribution.uses)
