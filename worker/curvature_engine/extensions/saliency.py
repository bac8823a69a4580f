"""Saliency: by how much the loss would grow, to second order, if a parameter were set to zero at a minimum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvature_engine.extensions.base import Extension, KroneckerFactors
from curvature_engine.extensions.ggn_diagonal import Diagonal
from curvature_engine.extensions.schemas import MC_SAMPLES

_DIAGONAL = {
    "type": "string",
    "enum": ["exact", "mc"],
    "default": "exact",
    "description": 'which diagonal of the GGN: "exact", or "mc" with mc_samples draws',
}


class _Saliency(Diagonal):
    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        sums, parameters = self._totals(), self.setting.parameters
        return {n: parameters[n].to(d.dtype).square() * d / (2 * self.setting.draws) for n, d in sums.items()}


def _adapt(options: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"columns": "exact" if options["diagonal"] == "exact" else "sampled"}


SALIENCY = Extension(
    "saliency",
    "by how much the loss grows, to second order, without the parameter",
    "parameters",
    "[*p]",
    "½ θ² · diag, with diag the diagonal of the generalized Gauss-Newton matrix",
    "LeCun, Denker & Solla 1990, with the GGN's diagonal for the Hessian's",
    "exact",
    _Saliency,
    {"diagonal": _DIAGONAL, "mc_samples": MC_SAMPLES},
    _adapt,
    merging="sum",
    degree=1.0,
    any_root=True,
)
