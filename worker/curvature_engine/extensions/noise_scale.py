"""The gradient noise scale: how many samples a gradient needs before its noise is as small as itself.

tr Σ is the trace of the covariance of single samples' gradients, G the batch's gradient. ‖G‖² overestimates the true
gradient's square by tr Σ/N, which is taken off (McCandlish et al. 2018, appendix A.1).
"""

from collections import defaultdict

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.errors import EngineError
from curvature_engine.extensions.base import WHOLE, Accumulator, Extension, KroneckerFactors, Setting


class _NoiseScale(Accumulator):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.N < 2:
            raise EngineError(
                "invalid_inputs",
                f"gradient_noise_scale expects at least two samples; got {setting.N}",
                param="inputs",
                remedy="give a larger batch: one gradient has no variance",
            )
        self._layers: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, parameter: str, contribution: Contribution) -> None:
        total = contribution.total()
        spread = contribution.sum_squared(center=total / self.setting.N).sum(dtype=torch.float64)
        layer = parameter.rpartition(".")[0] or parameter
        self._layers[layer].append(torch.stack([spread, total.square().sum(dtype=torch.float64)]))

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        sums = {layer: torch.stack(parts).sum(0) for layer, parts in self._layers.items()}
        found = {layer: self._scale(of_layer) for layer, of_layer in sums.items()}
        return {**found, WHOLE: self._scale(torch.stack(list(sums.values())).sum(0))}

    def _scale(self, sums: Tensor) -> Tensor:
        """B from Σ_n ‖g_n − Σ g/N‖² and ‖Σ g‖². Whatever factor the reduction puts on all g_n cancels."""
        N = self.setting.N
        trace = N * N * sums[0] / (N - 1)
        scale: Tensor = trace / (sums[1] - trace / N)
        return scale


GRADIENT_NOISE_SCALE = Extension(
    "gradient_noise_scale",
    "gradient noise scale of each layer and of all parameters together",
    "parameters",
    "[] per layer",
    "B = tr Σ/(‖G‖² − tr Σ/N), tr Σ = N²·Σ variance·N/(N−1) and G = grad under mean (under sum the same B); keyed by "
    'layer, "*" over all parameters; not positive where the noise hides the gradient',
    "McCandlish, Kaplan & Amodei 2018, appendix A.1",
    "gradient",
    _NoiseScale,
)
