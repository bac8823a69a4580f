"""Quantities of the individual gradients g_n, the gradients of the samples' contributions to L."""

from abc import abstractmethod

from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import Accumulator, Extension, KroneckerFactors, Setting

_SOURCE = "Dangel, Kunstner & Hennig 2020, table 1"


class _PerParameter(Accumulator):
    """One reduction of one column."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._results: dict[str, Tensor] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        self._results[parameter] = self.reduce(contribution)

    @abstractmethod
    def reduce(self, contribution: Contribution) -> Tensor:
        """The result from the one column."""

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return dict(self._results)


class _BatchGrad(_PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.materialised()


class _BatchL2(_PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.squared_norms()


class _SumGradSquared(_PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.sum_squared()


class _Variance(_PerParameter):
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
)
BATCH_L2 = Extension(
    "batch_l2",
    "squared norms of the individual gradients, per parameter",
    "parameters",
    "[N]",
    "‖g_n‖²",
    _SOURCE,
    "gradient",
    _BatchL2,
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
)
