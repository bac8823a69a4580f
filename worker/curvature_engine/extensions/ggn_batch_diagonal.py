"""The diagonal of each sample's summand of the generalized Gauss-Newton matrix, exact and by Monte Carlo."""

from collections.abc import Sequence

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting
from curvature_engine.extensions.schemas import MC_SAMPLES, SUBSAMPLING
from curvature_engine.stores import Slab


class BatchDiagonal(Accumulator):
    """Σ over columns of the squared back-propagated column, sample by sample."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sums: dict[str, Slab] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        if parameter not in self._sums:
            self._sums[parameter] = self.setting.slab(parameter, (self.setting.N,))
        for first, block in contribution.blocks():
            self._add_to(parameter, self.rows[first : first + len(block)], block.square() / self.setting.draws)

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.setting.N, *shape)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return {name: total.result() for name, total in self._sums.items()}

    def _add_to(self, parameter: str, rows: Sequence[int], block: Tensor) -> None:
        def change(sums: Tensor) -> None:
            sums += block.to(sums.device)

        self._sums[parameter].update(rows, change)


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
