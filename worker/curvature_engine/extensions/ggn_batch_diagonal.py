"""The diagonal of each sample's summand of the generalized Gauss-Newton matrix, exact and by Monte Carlo."""

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting
from curvature_engine.extensions.schemas import MC_SAMPLES, SUBSAMPLING


class BatchDiagonal(Accumulator):
    """Σ over columns of the squared back-propagated column, sample by sample."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._sums: dict[str, Tensor] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        for first, block in contribution.blocks():
            if parameter not in self._sums:
                self._sums[parameter] = block.new_zeros((self.setting.N, *contribution.shape))
            self._sums[parameter][first : first + len(block)].addcmul_(block, block)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return {name: total.div_(self.setting.draws) for name, total in self._sums.items()}


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
)
