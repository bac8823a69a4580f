"""The registry of extensions: the only list of them.

A new extension is one file here and one line below.
"""

from curvature_engine.extensions.base import (
    WHOLE,
    Accumulator,
    Against,
    Extension,
    ForeseenUse,
    KroneckerFactors,
    Setting,
    Sketch,
)
from curvature_engine.extensions.batch_dot import BATCH_DOT
from curvature_engine.extensions.first_order import BATCH_GRAD, BATCH_L2, SUM_GRAD_SQUARED, VARIANCE
from curvature_engine.extensions.ggn_batch_diagonal import BATCH_DIAG_GGN_EXACT, BATCH_DIAG_GGN_MC
from curvature_engine.extensions.ggn_diagonal import DIAG_GGN_EXACT, DIAG_GGN_MC
from curvature_engine.extensions.ggn_square_root import SQRT_GGN_EXACT, SQRT_GGN_MC
from curvature_engine.extensions.hessian_diagonal import BATCH_DIAG_HESSIAN, DIAG_HESSIAN
from curvature_engine.extensions.kfra import KFRA
from curvature_engine.extensions.kronecker import KFAC, KFLR
from curvature_engine.extensions.mergers import Merger, State
from curvature_engine.extensions.noise_scale import GRADIENT_NOISE_SCALE
from curvature_engine.extensions.saliency import SALIENCY

BATCH_LOSS = Extension(
    "batch_loss",
    "each sample's contribution to the loss",
    "tensor",
    "[N]",
    "a sample's terms divided by Z; they sum to L",
    "definition",
    "outputs",
    merging="append",
    degree=1.0,
)
OUTPUTS = Extension(
    "outputs",
    "the model's outputs",
    "tensor",
    "[N, …]",
    "f(θ, x)",
    "definition",
    "outputs",
    merging="append",
    degree=0.0,
)
GRAD = Extension(
    "grad",
    "gradient of the loss",
    "parameters",
    "[*p]",
    "∇L = Σ_n g_n",
    "definition",
    "gradient",
    merging="sum",
    degree=1.0,
)

EXTENSIONS: dict[str, Extension] = {
    extension.name: extension
    for extension in (
        BATCH_LOSS,
        OUTPUTS,
        GRAD,
        BATCH_GRAD,
        BATCH_L2,
        BATCH_DOT,
        SUM_GRAD_SQUARED,
        VARIANCE,
        GRADIENT_NOISE_SCALE,
        DIAG_GGN_EXACT,
        DIAG_GGN_MC,
        BATCH_DIAG_GGN_EXACT,
        BATCH_DIAG_GGN_MC,
        SQRT_GGN_EXACT,
        SQRT_GGN_MC,
        SALIENCY,
        DIAG_HESSIAN,
        BATCH_DIAG_HESSIAN,
        KFAC,
        KFLR,
        KFRA,
    )
}

__all__ = [
    "EXTENSIONS",
    "WHOLE",
    "Accumulator",
    "Against",
    "Extension",
    "ForeseenUse",
    "KroneckerFactors",
    "Merger",
    "Setting",
    "Sketch",
    "State",
]
