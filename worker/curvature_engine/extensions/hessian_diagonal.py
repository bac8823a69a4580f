"""The diagonal of the Hessian, in all and sample by sample: that of the GGN plus that of the residual."""

from torch import Tensor

from curvature_engine.extensions.base import Extension
from curvature_engine.extensions.ggn_batch_diagonal import BatchDiagonal
from curvature_engine.extensions.ggn_diagonal import Diagonal
from curvature_engine.extensions.schemas import SUBSAMPLING


class _Diagonal(Diagonal):
    def add_residual(self, parameter: str, first: int, block: Tensor) -> None:
        self._put(parameter, block.sum(0))


class _BatchDiagonal(BatchDiagonal):
    def add_residual(self, parameter: str, first: int, block: Tensor) -> None:
        self.stop()
        self._add_block(parameter, first, block)


DIAG_HESSIAN = Extension(
    "diag_hessian",
    "diagonal of the loss's Hessian",
    "parameters",
    "[*p]",
    "diag ∇²L = diag Σ_n J_nᵀ H_n J_n + diag ∇²_θ Σ_n c_nᵀ f_n, c_n = ∂L/∂f_n held fixed",
    "Dangel, Kunstner & Hennig 2020, appendix A.3 (quantity); second backward to the layers' outputs (scheme)",
    "exact",
    _Diagonal,
    {"subsampling": SUBSAMPLING},
    residual="sum",
    merging="sum",
    degree=1.0,
    any_root=True,
)
BATCH_DIAG_HESSIAN = Extension(
    "batch_diag_hessian",
    "diagonal of each sample's summand of the loss's Hessian",
    "parameters",
    "[N, *p]",
    "diag J_nᵀ H_n J_n + diag ∇²_θ c_nᵀ f_n; the samples' diagonals sum to diag_hessian",
    "Dangel, Kunstner & Hennig 2020, appendix A.3 (quantity); second backward to the layers' outputs (scheme)",
    "exact",
    _BatchDiagonal,
    {"subsampling": SUBSAMPLING},
    residual="per sample",
    merging="append",
    streams=True,
    degree=1.0,
    any_root=True,
)
