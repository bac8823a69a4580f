"""Quantities of the individual gradients g_n, the gradients of the samples' contributions to L."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from curvature_engine.contributions import Contribution
from curvature_engine.extensions.base import WHOLE, Accumulator, Extension, KroneckerFactors, Setting, Sketch
from curvature_engine.extensions.mergers import OWN, Merger, State, companion
from curvature_engine.extensions.moments import Moments
from curvature_engine.extensions.schemas import (
    OVER,
    SCALE,
    SUBSAMPLING,
    adapt_to_over_and_scale,
    adapt_to_scale,
)
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
    writes = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._slabs: dict[str, Slab] = {}
        self._factor = setting.Z if setting.options["scale"] == "sample" else 1.0

    def add(self, parameter: str, contribution: Contribution) -> None:
        if parameter not in self._slabs:
            self._slabs[parameter] = self.setting.slab(parameter, (self.setting.N,))
        contribution = contribution.scaled(self._factor)
        place = self._slabs[parameter].place(self.rows)
        if place is not None:
            contribution.write_into(place)
            return
        for first, block in contribution.blocks():
            self._slabs[parameter].write(self.rows[first : first + len(block)], block)

    def result_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.setting.N, *shape)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        return {name: slab.result() for name, slab in self._slabs.items()}


class _BatchL2(PerParameter):
    reductions = frozenset({"squared_norms"})

    def reduce(self, contribution: Contribution) -> Tensor:
        norms = contribution.squared_norms()
        if len(norms) == self.setting.N and self.rows == range(self.setting.N):
            return norms
        return norms.new_zeros(self.setting.N).index_copy_(0, _numbers(self.rows, norms), norms)

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        form = "gram" if contribution.is_reduced("squared_norms") else "materialised"
        return Sketch(form, contribution.norms_multiply_adds(), ((self.setting.N,),))


class _SumGradSquared(PerParameter):
    reductions = frozenset({"sum_squared"})

    def reduce(self, contribution: Contribution) -> Tensor:
        return contribution.sum_squared()

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        return sketch_of_squares(contribution)


class _Variance(Accumulator):
    reductions = frozenset({"moments"})

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._moments: dict[str, Moments] = {}
        self._factor = setting.Z**2 if setting.options["scale"] == "sample" else 1.0

    def add(self, parameter: str, contribution: Contribution) -> None:
        found, before = Moments.of(contribution, len(self.rows)), self._moments.get(parameter)
        self._moments[parameter] = found if before is None else before.joined(found)
        if not self.setting.part and self._moments[parameter].n == self.setting.N:  # the mean is of no more use
            self._moments[parameter] = replace(self._moments[parameter], mean=found.mean.new_empty(()))

    def sketch(self, parameter: str, contribution: Contribution) -> Sketch:
        shapes = (contribution.shape,) * (2 if self.setting.part else 1)
        return Sketch("materialised", contribution.multiply_adds(), shapes)

    def finish(self) -> dict[str, Tensor | KroneckerFactors]:
        N, factor = self.setting.N, self._factor
        return {n: m.spread.div_(N) if factor == 1.0 else m.spread.mul_(factor / N) for n, m in self._moments.items()}

    def state(self) -> dict[str, Tensor | KroneckerFactors]:
        means = {companion(name, "mean"): m.mean for name, m in self._moments.items()}
        return {**{name: m.spread for name, m in self._moments.items()}, **means}


class Welford(Merger):
    """Mean and spread of parts as of one; the result is the variance."""

    companions = ("mean",)

    def join(self, before: State, N: int, state: State, n: int) -> State:
        joined = Moments(N, before["mean"], before[OWN]).joined(Moments(n, state["mean"], state[OWN]))
        return {OWN: joined.spread, "mean": joined.mean}

    def result(self, state: State, N: int) -> Tensor:
        return state[OWN] / N


def sketch_of_squares(contribution: Contribution) -> Sketch:
    """Of Σ g²: a rule's own sum, or gradients written out."""
    form = "reduced" if contribution.is_reduced("sum_squared") else "materialised"
    return Sketch(form, contribution.multiply_adds(), (contribution.shape,))


def _numbers(rows: Sequence[int], like: Tensor) -> Tensor:
    if isinstance(rows, range):  # made on the device: nothing is sent
        return torch.arange(rows.start, rows.stop, rows.step, device=like.device)
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
    adapt_to_scale,
    merging="append",
    streams=True,
    degree=1.0,
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
    adapt_to_over_and_scale,
    merging="append",
    degree=2.0,
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
    adapt_to_scale,
    merging="sum",
    degree=2.0,
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
    adapt_to_scale,
    merging="welford",
    degree=2.0,
    merger=Welford,
)
