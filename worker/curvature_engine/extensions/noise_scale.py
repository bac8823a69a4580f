"""The gradient noise scale: how many samples a gradient needs before its noise is as small as itself.

tr Σ is the trace of the covariance of single samples' gradients, G the batch's gradient. ‖G‖² overestimates the true
gradient's square by tr Σ/N, which is taken off (McCandlish et al. 2018, appendix A.1).
"""

from collections import defaultdict

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.errors import EngineError
from curvature_engine.extensions.base import WHOLE, Accumulator, Extension, KroneckerFactors, Setting, Sketch


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
        self._sums: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._taken: dict[str, int] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        n = len(self.rows)
        total = contribution.total()
        spread = contribution.sum_squared(center=total / n).sum(dtype=torch.float64)
        if n < self.setting.N:
            total, spread = self._merged(parameter, n, total, spread)
        self._sums[parameter] = torch.stack([spread, total.square().sum(dtype=torch.float64)])

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        return Sketch("materialised", 2 * contribution.multiply_adds(), ((),))

    def _merged(self, parameter: str, n: int, total: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Σ g and Σ ‖g − mean‖² of a part and the parts before together (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        before = self._taken.get(parameter, 0)
        if before:
            shift = (total / n - self._totals[parameter] / before).square().sum(dtype=torch.float64)
            spread = self._sums[parameter][0] + spread + shift * (n * before / (n + before))
            total = self._totals[parameter] + total
        self._totals[parameter], self._taken[parameter] = total, before + n
        return total, spread

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        layers: dict[str, list[Tensor]] = defaultdict(list)
        for parameter, of_parameter in self._sums.items():
            layers[parameter.rpartition(".")[0] or parameter].append(of_parameter)
        sums = {layer: torch.stack(parts).sum(0) for layer, parts in layers.items()}
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
    merging="welford",
)
