"""Squares of individual gradients summed over columns, in the forms in which they come: made whole once, at the end."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvature_engine import position_pairs
from curvature_engine.closed_form import ClosedForm
from curvature_engine.column_squares import ColumnSquares
from curvature_engine.contributions import Contribution
from curvature_engine.errors import memory_ran_out
from curvature_engine.extensions.base import Sketch
from curvature_engine.position_pairs import PositionPairs
from curvature_engine.reductions import Assemble, Outer, SumSquared
from curvature_engine.stacked import Stacked
from curvature_engine.stacked_squares import fitting, stacked_squares, working_bytes


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
        self._sums: dict[str, tuple[SumSquared, Assemble]] = {}
        self._columns: dict[str, ColumnSquares] = {}
        self._others: set[str] = set()

    def take(self, parameter: str, contribution: Contribution) -> bool:
        """Add a column's; False where there is a shorter way to the sum of squares."""
        if parameter in self._others:
            return False
        if parameter in self._sums:
            taken = contribution.add_squares_to(self._sums[parameter][0])
        else:
            found = None if contribution.is_reduced("sum_squared") else contribution.squares_in_pieces()
            taken = found is not None
            if found is not None:
                self._sums[parameter] = found
        if not taken:
            self._others.add(parameter)
        return taken

    def take_stacked(self, parameter: str, stacked: Stacked) -> bool:
        """Add several columns'; False where they are to come one after another."""
        if parameter not in self._columns:
            found = ColumnSquares.of(stacked.column(0))
            if found is None:
                return False
            self._columns[parameter] = found
        self._columns[parameter].add(stacked.uses[0][1])
        return True

    def release(self) -> Iterator[tuple[str, Tensor]]:
        """What there is, parameter by parameter, [*p] each, which is forgotten."""
        for parameter in list(self._sums):
            squares, assemble = self._sums.pop(parameter)
            yield parameter, assemble(squares.pieces)
        for parameter in list(self._columns):
            yield parameter, self._columns.pop(parameter).total()
        self._others.clear()


_HELD_BYTES = 2**25
"""Of one parameter's columns that wait to be squared together."""
_STACKED_BYTES = 2**28
"""The same on accelerators."""
_STACKED_ROOM = 16
"""And how much more room there is for all of them: four blocks, a quarter of the budget at most."""


class WaitingColumns:
    """The columns of one part of the samples, by parameter, that are squared together: see `squares`.

    Args:
        columns: how many will come.
        room_bytes: for all that wait; what finds none is squared column by column.
        summed: whether squares are summed over the samples, too.
    """

    def __init__(self, columns: int, room_bytes: int, *, summed: bool) -> None:
        self._columns, self._summed = columns, summed
        self._room = self._left = room_bytes
        self._waiting: dict[str, list[ClosedForm]] = {}
        self._most: dict[str, int] = {}
        """How many columns of a parameter wait at a time; 0 where it is not for this form."""
        self._foreseen: dict[str, int] = {}

    def take(self, parameter: str, contribution: Contribution) -> bool:
        """Add a column's; False where it is to be squared by itself."""
        if not isinstance(contribution, ClosedForm) or not self.waits(parameter, lambda: contribution):
            return False
        waiting = self._waiting.setdefault(parameter, [])
        if waiting and not _are_alike(waiting[0], contribution):
            return False
        waiting.append(contribution)
        return True

    def waits(self, parameter: str, make: Callable[[], ClosedForm]) -> bool:
        """Whether such a contribution's columns are squared together."""
        if self._columns == 1:
            return False
        if parameter not in self._most:
            contribution = make()
            self._most[parameter] = most = self._fitting(contribution, self._left)
            self._left -= most * _held_bytes(contribution)
        return self._most[parameter] > 0

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

    def foresee(self, parameter: str, contribution: Contribution, leading: tuple[int, ...] = ()) -> Sketch | None:
        """What is foreseen of a parameter, for a result [*leading, *p]; None where its columns do not wait.

        Its intermediates are with what waits of all parameters so far.
        """
        shapes = ((*leading, *contribution.shape),)
        if self._columns == 1 or not isinstance(contribution, ClosedForm):
            return None
        self._foreseen.pop(parameter, None)
        most = self._fitting(contribution, self._room - sum(self._foreseen.values()))
        if not most:
            return None
        self._foreseen[parameter] = most * _held_bytes(contribution)
        held = sum(self._foreseen.values())
        if self._stacks(contribution):
            held += working_bytes(contribution, most)
            return Sketch("materialised", contribution.multiply_adds(), shapes, intermediate_bytes=held)
        times = -(-self._columns // most)
        held += position_pairs.working_bytes(contribution)
        multiply_adds = times * position_pairs.multiply_adds(contribution) // self._columns
        return Sketch("gram", multiply_adds, shapes, intermediate_bytes=held)

    def _stacks(self, contribution: ClosedForm) -> bool:
        return self._summed and fitting(contribution) > 1

    def _fitting(self, contribution: ClosedForm, room_bytes: int) -> int:
        if self._stacks(contribution):
            room_bytes = min(_STACKED_BYTES, room_bytes + self._room * (_STACKED_ROOM - 1))
            most = min(self._columns, fitting(contribution), room_bytes // max(1, _held_bytes(contribution)))
            return most if most > 1 else 0
        most = min(self._columns, min(_HELD_BYTES, room_bytes) // max(1, _held_bytes(contribution)))
        return most if most > 1 and position_pairs.pay(contribution, most) else 0


def _are_alike(one: ClosedForm, other: ClosedForm) -> bool:
    """Whether two columns' gradients come from the same operator."""
    return [p.tap_index for p, _ in one.uses] == [p.tap_index for p, _ in other.uses]


def squares(waiting: Sequence[ClosedForm]) -> Tensor:
    """Σ over columns and samples of the squared gradients of a parameter, [*p]."""
    if fitting(waiting[0]) > 1:
        return stacked_squares(waiting)
    found = _of_pairs(PositionPairs(waiting))
    if found is None:
        found = waiting[0].sum_squared()
        for contribution in waiting[1:]:
            found.add_(contribution.sum_squared())
    return found


def squares_by_sample(waiting: Sequence[ClosedForm]) -> Iterator[tuple[int, Tensor]]:
    """(first sample, Σ over columns of the squared gradients [n, *p]), block by block."""
    pairs = PositionPairs(waiting)
    for n in range(pairs.N):
        found = _of_pairs(pairs, slice(n, n + 1))
        if found is None:
            one = torch.tensor([n])  # on the CPU, as all that waits
            parts = [contribution.select(one).materialised() for contribution in waiting]
            found = torch.stack(parts).square_().sum(0)[0]
        yield n, found[None]


def _of_pairs(pairs: PositionPairs, samples: slice | None = None) -> Tensor | None:
    """The sum of squares, if it is exact enough and memory suffices."""
    try:
        return pairs.sum_of_squares(samples)
    except (RuntimeError, MemoryError) as error:
        if not memory_ran_out(error):
            raise
        return None


def _held_bytes(contribution: ClosedForm) -> int:
    return sum(g.numel() * g.element_size() for _, g in contribution.uses)
