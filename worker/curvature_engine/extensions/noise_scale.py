"""The gradient noise scale: how many samples a gradient needs before its noise is as small as itself.

tr Σ is the trace of the covariance of single samples' gradients, G the batch's gradient. ‖G‖² overestimates the true
gradient's square by tr Σ/N, which is taken off (McCandlish et al. 2018, appendix A.1).
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.errors import EngineError
from curvature_engine.extensions.base import WHOLE, Accumulator, Extension, KroneckerFactors, Setting, Sketch
from curvature_engine.extensions.first_order import Welford
from curvature_engine.extensions.mergers import OWN, State, companion
from curvature_engine.extensions.moments import Moments


class _NoiseScale(Accumulator):
    reductions = frozenset({"moments"})

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if not setting.part:
            _check_number(setting.N)
        self._moments: dict[str, Moments] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        found, before = Moments.of(contribution, len(self.rows)).in_all(), self._moments.get(parameter)
        self._moments[parameter] = found if before is None else before.joined(found)
        if not self.setting.part and self._moments[parameter].n == self.setting.N:
            self._sums[parameter] = _sums(self._moments.pop(parameter))

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        shapes = ((), contribution.shape) if self.setting.part else ((),)
        return Sketch("materialised", contribution.multiply_adds(), shapes)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        in_order = {name: self._sums[name] for name in self.setting.parameters if name in self._sums}
        return {**_scales(in_order, self.setting.N)}

    def state(self) -> dict[str, Tensor | KroneckerFactors]:
        means = {companion(name, "mean"): m.mean for name, m in self._moments.items()}
        return {**{name: m.spread for name, m in self._moments.items()}, **means}


class _Scales(Welford):
    """Mean and spread of parts as of one; the result is made of all parameters' together."""

    gathers = True

    def result(self, state: State, N: int) -> Tensor:
        return _sums(Moments(N, state["mean"], state[OWN]))

    def gather(self, results: Mapping[str, Tensor], N: int) -> dict[str, Tensor]:
        _check_number(N)
        return _scales(results, N)


def _sums(moments: Moments) -> Tensor:
    """(Σ ‖g − mean‖², ‖mean‖²) of one parameter."""
    return torch.stack([moments.spread, moments.mean.square().sum(dtype=torch.float64)])


def _scales(sums: Mapping[str, Tensor], N: int) -> dict[str, Tensor]:
    """B of every layer and of all together, from `_sums` of the parameters."""
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for parameter, of_parameter in sums.items():
        layers[parameter.rpartition(".")[0] or parameter].append(of_parameter)
    of_layers = {layer: torch.stack(parts).sum(0) for layer, parts in layers.items()}
    found = {layer: _scale(of_layer, N) for layer, of_layer in of_layers.items()}
    return {**found, WHOLE: _scale(torch.stack(list(of_layers.values())).sum(0), N)}


def _scale(sums: Tensor, N: int) -> Tensor:
    """B from Σ_n ‖g_n − mean‖² and ‖mean‖². Whatever factor the reduction puts on all g_n cancels."""
    variance = sums[0] / (N - 1)
    return variance / (sums[1] - variance / N)


def _check_number(N: int) -> None:
    if N < 2:
        raise EngineError(
            "invalid_inputs",
            f"gradient_noise_scale expects at least two samples; got {N}",
            param="inputs",
            remedy="give a larger batch: one gradient has no variance",
        )


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
    degree=0.0,
    merger=_Scales,
)
