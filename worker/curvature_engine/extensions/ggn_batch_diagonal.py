"""The diagonal of each sample's summand of the generalized Gauss-Newton matrix, exact and by Monte Carlo."""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from curvature_engine.closed_form import ClosedForm
from curvature_engine.column_squares import SampleSquares
from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting, Sketch
from curvature_engine.extensions.schemas import MC_SAMPLES, SUBSAMPLING
from curvature_engine.extensions.squared_columns import (
    SquaredOuters,
    WaitingColumns,
    squares_by_sample,
)
from curvature_engine.stacked import Stacked
from curvature_engine.stores import Slab

_BLOCK_NUMBERS = 2**22
"""Of products that are made before they are added."""
_NEAR_BYTES = 2**23
"""Of inputs unfolded whole: a few samples' at a time are unfolded anew sooner than more are read again."""


class BatchDiagonal(Accumulator):
    """Σ over columns of the squared back-propagated column, sample by sample."""

    keeps_windows = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sums: dict[str, Slab] = {}
        self._outers = SquaredOuters()
        self._waiting = WaitingColumns(setting.columns, setting.budget_bytes // 4, summed=False)
        self._products: dict[str, SampleSquares | None] = {}
        """Of columns that come several at a time."""
        self._single: dict[str, SampleSquares | None] = {}
        """Of those that come one by one."""
        self._begun: set[str] = set()
        """Parameters with something in the current part's rows."""

    def start(self, rows: Sequence[int]) -> None:
        self._begun.clear()
        super().start(rows)

    def add(self, parameter: str, contribution: Contribution) -> None:
        if self._outers.take(parameter, contribution):
            return
        if self._waiting.take(parameter, contribution):
            if self._waiting.full(parameter):
                self._add_squares(parameter, self._waiting.release(parameter))
            return
        for first, block in self._blocks(parameter, contribution):
            self._add_gradients(parameter, first, block)

    def add_stacked(self, parameter: str, stacked: Stacked) -> bool:
        if stacked.needs_inputs:
            return self._outers.take_stacked(parameter, stacked) or self._add_products(parameter, stacked)
        gradients = stacked.as_more_samples().materialised()
        squares = gradients.view(stacked.k, stacked.N, *gradients.shape[1:]).square().sum(0)
        self._add_block(parameter, 0, squares.div_(self.setting.draws))
        return True

    def _add_products(self, parameter: str, stacked: Stacked) -> bool:
        """Add several columns' squared products with one thing made of the inputs; False where they are no such."""
        if parameter not in self._products:
            waits = self._waiting.waits(parameter, partial(stacked.column, 0))
            self._products[parameter] = None if waits else SampleSquares.of(stacked.column(0))
        products = self._products[parameter]
        if products is None:
            return False
        squares = products.squares(stacked.uses[0][1])
        self._add_block(parameter, 0, squares if self.setting.draws == 1 else squares.div_(self.setting.draws))
        return True

    def _blocks(self, parameter: str, contribution: Contribution) -> Iterator[tuple[int, Tensor]]:
        """(first sample, a column's gradients [n, *p], which may be overwritten by the next), block by block."""
        if not isinstance(contribution, ClosedForm):
            return contribution.blocks()
        if parameter not in self._single:
            self._single[parameter] = SampleSquares.of(contribution, most_bytes=_NEAR_BYTES)
        products = self._single[parameter]
        return contribution.blocks() if products is None else products.gradients(contribution.uses[0][1])

    def stop(self) -> None:
        self._products.clear()
        self._single.clear()
        for parameter, waiting in self._waiting.release_all():
            self._add_squares(parameter, waiting)
        # What waits as outer products goes into the part's rows.
        for parameter, squares in self._outers.release().items():
            squares.column.div_(self.setting.draws)
            place = None if parameter in self._begun else self._slab(parameter).place(self.rows)
            if place is not None:
                squares.write_into(place)
                self._begun.add(parameter)
                continue
            numbers = min(_BLOCK_NUMBERS, self.setting.budget_bytes // 16)
            size = max(1, numbers // max(1, squares.kept.shape[1] * squares.column.shape[1]))
            for first in range(0, len(self.rows), size):
                self._add_block(parameter, first, squares.rows(first, first + size))

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        found = self._waiting.foresee(parameter, contribution, (self.setting.N,))
        return super().sketch(parameter, contribution) if found is None else found

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.setting.N, *shape)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return {name: self._sums[name].result() for name in self.setting.parameters if name in self._sums}

    def _slab(self, parameter: str) -> Slab:
        if parameter not in self._sums:
            self._sums[parameter] = self.setting.slab(parameter, (self.setting.N,))
        return self._sums[parameter]

    def _add_squares(self, parameter: str, waiting: Sequence[ClosedForm]) -> None:
        """Add the squares of columns that waited."""
        place = None if parameter in self._begun else self._slab(parameter).place(self.rows)
        for first, block in squares_by_sample(waiting):
            block = block if self.setting.draws == 1 else block.div_(self.setting.draws)
            if place is None:
                self._add_block(parameter, first, block)
            else:
                place[first : first + len(block)] = block
        self._begun.add(parameter)

    def _add_gradients(self, parameter: str, first: int, block: Tensor) -> None:
        """Add the squares of a column's gradients to the rows of the part's samples from `first` on."""

        def change(sums: Tensor) -> None:
            moved = block.to(sums.device)
            sums.addcmul_(moved, moved, value=1 / self.setting.draws)

        self._slab(parameter).update(self.rows[first : first + len(block)], change)
        self._begun.add(parameter)

    def _add_block(self, parameter: str, first: int, block: Tensor) -> None:
        """Add to the rows of the part's samples from `first` on."""

        def change(sums: Tensor) -> None:
            sums += block.to(sums.device)

        self._slab(parameter).update(self.rows[first : first + len(block)], change)
        self._begun.add(parameter)


BATCH_DIAG_GGN_EXACT = Extension(
    "batch_diag_ggn_exact",
    "diagonal of each sample's summand of the generalized Gauss-Newton matrix",
    "parameters",
    "[N, *p]",
    "diag J_nᵀ H_n J_n; the samples' diagonals sum to diag_ggn_exact",
    "Dangel, Kunstner & Hennig 2020, eq. 19",
    "exact",
    BatchDiagonal,
    {"subsampling": SUBSAMPLING},
    merging="append",
    streams=True,
    degree=1.0,
    any_root=True,
)
BATCH_DIAG_GGN_MC = Extension(
    "batch_diag_ggn_mc",
    "Monte-Carlo estimate of each sample's diagonal of the generalized Gauss-Newton matrix",
    "parameters",
    "[N, *p]",
    "diag J_nᵀ (1/M Σ_m s_nm s_nmᵀ) J_n, s from targets drawn from the model's likelihood; they sum to diag_ggn_mc",
    "Dangel, Kunstner & Hennig 2020, eq. 20",
    "sampled",
    BatchDiagonal,
    {"mc_samples": MC_SAMPLES, "subsampling": SUBSAMPLING},
    merging="append",
    streams=True,
    degree=1.0,
)
