"""Quantities of the individual gradients g_n, the gradients of the samples' contributions to L."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import WHOLE, Accumulator, Extension, KroneckerFactors, Setting
from curvature_engine.extensions.schemas import OVER, SCALE, SUBSAMPLING, adapt_to_over

_SOURCE = "Dangel, Kunstner & Hennig 2020, table 1"


class PerParameter(Accumulator):
    """One reduction of one column, per parameter or summed over all."""

    power: ClassVar[int] = 2
    """Of g_n in the result: what `scale` multiplies by is Z to this power."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._results: dict[str, Tensor] = {}
        self._factor = setting.Z**self.power if setting.options["scale"] == "sample" else 1.0

    def add(self, parameter: str, contribution: Contribution) -> None:
        result = self.reduce(contribution)
        result = result if self._factor == 1.0 else result * self._factor
        key = WHOLE if self.setting.options.get("over") == "model" else parameter
        self._results[key] = self._results[key] + result if key in self._results else result

    @abstractmethod
    def reduce(self, contribution: Contribution) -> Tensor:
        """The result from the one column."""

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return dict(self._results)


class _BatchGrad(PerParameter):
    power = 1

    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.materialised()


class _BatchL2(PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.squared_norms()


class _SumGradSquared(PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.sum_squared()


class _Variance(PerParameter):
    # Centred before squaring: the difference of two large sums gave negative variances for near-duplicates.
    def reduce(self, contribution: Contribution) -> Tensor:
        N = self.setting.N
        return contribution.sum_squared(center=contribution.total() / N) / N


BATCH_GRAD = Extension(
    "batch_grad",
    "individual gradients",
    "parameters",
    "[N, *p]",
    "g_n, the gradient of sample n's contribution to L (with its 1/N under mean)",
    _SOURCE,
    "gradient",
    _BatchGrad,
    {"scale": SCALE, "subsampling": SUBSAMPLING},
)
BATCH_L2 = Extension(
    "batch_l2",
    "squared norms of the individual gradients",
    "parameters",
    "[N]",
    "‖g_n‖²",
    _SOURCE,
    "gradient",
    _BatchL2,
    {"over": OVER, "scale": SCALE, "subsampling": SUBSAMPLING},
    adapt_to_over,
)
SUM_GRAD_SQUARED = Extension(
    "sum_grad_squared",
    "second moment of the individual gradients",
    "parameters",
    "[*p]",
    "Σ_n g_n²",
    _SOURCE,
    "gradient",
    _SumGradSquared,
    {"scale": SCALE, "subsampling": SUBSAMPLING},
)
VARIANCE = Extension(
    "variance",
    "variance of the individual gradients",
    "parameters",
    "[*p]",
    "Σ_n g_n²/N − (Σ_n g_n/N)², computed centred (biased; of contributions, so under mean Var(∇ℓ)/N²)",
    _SOURCE,
    "gradient",
    _Variance,
    {"scale": SCALE, "subsampling": SUBSAMPLING},
)
