"""Quantities of the individual gradients g_n, the gradients of the samples' contributions to L."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import WHOLE, Accumulator, Extension, KroneckerFactors, Setting, Sketch
from curvature_engine.extensions.schemas import OVER, SCALE, SUBSAMPLING, adapt_to_over
from curvature_engine.stores import Slab

_SOURCE = "Dangel, Kunstner & Hennig 2020, table 1"


class PerParameter(Accumulator):
    """One reduction of one column, per parameter or summed over all; the parts' results add up."""

    power: ClassVar[int] = 2
    """Of g_n in the result: what `scale` multiplies by is Z to this power."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._results: dict[str, Tensor] = {}
        self._factor = setting.Z**self.power if setting.options["scale"] == "sample" else 1.0

    def add(self, parameter: str, contribution: Contribution) -> None:
        self._put(parameter, self._scaled(self.reduce(contribution)))

    def _put(self, parameter: str, result: Tensor) -> None:
        key = self._key(parameter)
        self._results[key] = self._results[key] + result if key in self._results else result

    def _scaled(self, result: Tensor) -> Tensor:
        return result if self._factor == 1.0 else result * self._factor

    def _key(self, parameter: str) -> str:
        return WHOLE if self.setting.options.get("over") == "model" else parameter

    @abstractmethod
    def reduce(self, contribution: Contribution) -> Tensor:
        """The result from the one column."""

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return dict(self._results)


class _BatchGrad(Accumulator):
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._slabs: dict[str, Slab] = {}
        self._factor = setting.Z if setting.options["scale"] == "sample" else 1.0

    def add(self, parameter: str, contribution: Contribution) -> None:
        if parameter not in self._slabs:
            self._slabs[parameter] = self.setting.slab(parameter, (self.setting.N,))
        for first, block in contribution.blocks():
            scaled = block if self._factor == 1.0 else block * self._factor
            self._slabs[parameter].write(self.rows[first : first + len(block)], scaled)

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.setting.N, *shape)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return {name: slab.result() for name, slab in self._slabs.items()}


class _BatchL2(PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        norms = contribution.squared_norms()
        return norms.new_zeros(self.setting.N).index_copy_(0, _numbers(self.rows, norms), norms)

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        form = "gram" if contribution.is_reduced("squared_norms") else "materialised"
        return Sketch(form, contribution.norms_multiply_adds(), ((self.setting.N,),))


class _SumGradSquared(PerParameter):
    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.sum_squared()

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        return sketch_of_squares(contribution)


class _Variance(PerParameter):
    # Centred before squaring: the difference of two large sums gave negative variances for near-duplicates.
    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._means: dict[str, Tensor] = {}
        self._taken: dict[str, int] = {}

    def add(self, parameter: str, contribution: Contribution) -> None:
        n = len(self.rows)
        mean, spread = self._moments(contribution, n)
        if n < self.setting.N:
            mean, spread = self._merged(parameter, n, mean, spread)
        self._results[parameter] = spread

    def reduce(self, contribution: Contribution) -> Tensor:
        raise AssertionError("means are needed beside the spread")

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return {name: self._scaled(spread / self.setting.N) for name, spread in self._results.items()}

    @staticmethod
    def _moments(contribution: Contribution, n: int) -> tuple[Tensor, Tensor]:
        """The mean and Σ (g − mean)² of a part."""
        mean = contribution.total() / n
        return mean, contribution.sum_squared(center=mean)

    def _merged(self, parameter: str, n: int, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """The part's moments and those of the parts before, as of one (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        before = self._taken.get(parameter, 0)
        if before:
            shift = mean - self._means[parameter]
            mean = self._means[parameter] + shift * (n / (n + before))
            spread = self._results[parameter] + spread + shift.square() * (n * before / (n + before))
        self._means[parameter], self._taken[parameter] = mean, before + n
        return mean, spread


def sketch_of_squares(contribution: Contribution) -> Sketch:
    """Of Σ g²: a rule's own sum, or gradients written out."""
    form = "reduced" if contribution.is_reduced("sum_squared") else "materialised"
    return Sketch(form, contribution.multiply_adds(), (contribution.shape,))


def _numbers(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(rows), device=like.device)


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
    merging="append",
    streams=True,
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
    merging="append",
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
    merging="sum",
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
    merging="welford",
)
