"""The diagonal of the generalized Gauss-Newton matrix, exact and by Monte Carlo."""

from functools import partial

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting, Sketch
from curvature_engine.extensions.first_order import sketch_of_squares
from curvature_engine.extensions.schemas import MC_SAMPLES, SUBSAMPLING
from curvature_engine.extensions.squared_columns import (
    SquaredOuters,
    SquaredPieces,
    WaitingColumns,
    squares,
)
from curvature_engine.stacked import Stacked


class Diagonal(Accumulator):
    """Σ over columns and samples of the squared back-propagated column."""

    reductions = frozenset({"sum_squared"})

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sums: dict[str, Tensor] = {}
        self._outers, self._pieces = SquaredOuters(), SquaredPieces()
        self._waiting = WaitingColumns(setting.columns, setting.budget_bytes // 4, summed=True)

    def add(self, parameter: str, contribution: Contribution) -> None:
        if self.setting.columns > 1:
            if self._outers.take(parameter, contribution):
                return
            if self._waiting.take(parameter, contribution):
                if self._waiting.full(parameter):
                    self._put(parameter, squares(self._waiting.release(parameter)))
                return
            if self._pieces.take(parameter, contribution):
                return
        self._put(parameter, contribution.sum_squared())

    def add_stacked(self, parameter: str, stacked: Stacked) -> bool:
        if stacked.needs_inputs:
            if self._outers.take_stacked(parameter, stacked):
                return True
            if self._waiting.waits(parameter, partial(stacked.column, 0)):
                return False
            return self._pieces.take_stacked(parameter, stacked)
        self._put(parameter, stacked.as_more_samples().sum_squared())
        return True

    def stop(self) -> None:
        for parameter, columns in self._waiting.release_all():
            self._put(parameter, squares(columns))
        for parameter, total in self._pieces.release():
            self._put(parameter, total)
        for parameter, outer in self._outers.release().items():
            self._put(parameter, outer.sum())

    def _put(self, parameter: str, part: Tensor) -> None:
        if parameter in self._sums:
            self._sums[parameter].add_(part)
        else:
            self._sums[parameter] = part

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        return self._waiting.foresee(parameter, contribution) or sketch_of_squares(contribution)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        draws = self.setting.draws
        return {name: total if draws == 1 else total / draws for name, total in self._totals().items()}

    def _totals(self) -> dict[str, Tensor]:
        """The sums over all columns and samples."""
        return {name: self._sums[name] for name in self.setting.parameters if name in self._sums}


DIAG_GGN_EXACT = Extension(
    "diag_ggn_exact",
    "diagonal of the generalized Gauss-Newton matrix",
    "parameters",
    "[*p]",
    "diag Σ_n J_nᵀ H_n J_n",
    "Dangel, Kunstner & Hennig 2020, eq. 19",
    "exact",
    Diagonal,
    {"subsampling": SUBSAMPLING},
    merging="sum",
    degree=1.0,
    any_root=True,
)
DIAG_GGN_MC = Extension(
    "diag_ggn_mc",
    "Monte-Carlo estimate of the diagonal of the generalized Gauss-Newton matrix",
    "parameters",
    "[*p]",
    "diag Σ_n J_nᵀ (1/M Σ_m s_nm s_nmᵀ) J_n, s with E s sᵀ = H_n: from targets drawn from the "
    "model's likelihood (cross-entropy, squared error, bce_with_logits), else root(H_n) times normal numbers",
    "Dangel, Kunstner & Hennig 2020, eq. 20",
    "sampled",
    Diagonal,
    {"mc_samples": MC_SAMPLES, "subsampling": SUBSAMPLING},
    merging="sum",
    degree=1.0,
)
