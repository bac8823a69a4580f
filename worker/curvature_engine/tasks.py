"""Who takes what: parts of a batch, and the requests that take their shares of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature_engine.contributions import Contribution
from curvature_engine.errors import EngineError
from curvature_engine.extensions import Accumulator
from curvature_engine.few import FewSamples
from curvature_engine.program import Forward
from curvature_engine.requests import Request
from curvature_engine.stacked import Stacked
from curvature_engine.tape import backward


@dataclass(frozen=True)
class Part:
    """Samples `start` … `stop` of the batch, and their forward pass.

    Attributes:
        few: the batch's first few samples, where a verdict on them may hold for all.
    """

    forward: Forward
    outputs: Tensor
    start: int
    stop: int
    few: FewSamples | None = None

    @property
    def n(self) -> int:
        """How many samples."""
        return self.stop - self.start

    def rows(self, column: Tensor) -> Tensor:
        """Its rows of a column of the whole batch."""
        return column[self.start : self.stop].to(self.outputs.dtype)

    def rows_of_several(self, columns: Tensor) -> Tensor:
        """Its rows of several columns of the whole batch, [k, N, …]."""
        return columns[:, self.start : self.stop].to(self.outputs.dtype)

    def at_taps(
        self, numbers: Sequence[int], cotangent: Tensor, start: GradientEdge | None = None, *, last: bool = False
    ) -> dict[int, Tensor | None]:
        """The gradients of some taps' outputs, by the taps' numbers; of a cotangent of the outputs, or at `start`.

        After the `last` ones the graph is gone.
        """
        taps = [self.forward.tape.taps[i] for i in numbers]
        edges = [tap.edges[0] for tap in taps]
        found = backward(self.outputs if start is None else start, edges, cotangent, last=last)
        return {i: tap.shaped([g])[0] for i, tap, g in zip(numbers, taps, found, strict=True)}


@dataclass(frozen=True)
class Task:
    """One request's accumulator, and the samples of the batch that it takes (None for all)."""

    request: Request
    accumulator: Accumulator
    samples: Sequence[int] | None

    def share(self, part: Part) -> "Share | None":
        """What it takes of a part; None where that is nothing."""
        if self.samples is None:
            self.accumulator.start(range(part.start, part.stop))
            return Share(self.request, self.accumulator, None)
        rows = [row for row, n in enumerate(self.samples) if part.start <= n < part.stop]
        if not rows:
            return None
        self.accumulator.start(rows)
        chosen = [self.samples[row] - part.start for row in rows]
        return Share(self.request, self.accumulator, torch.tensor(chosen, device=part.outputs.device))


@dataclass(frozen=True)
class Share:
    """What a request takes of one part: some of its samples, counted from its first, or None for all."""

    request: Request
    accumulator: Accumulator
    samples: Tensor | None

    @property
    def columns(self) -> str:
        """What is propagated back for it."""
        return self.request.extension.columns

    def take(self, parameter: str, contribution: Contribution) -> None:
        """Take one column's contribution of one parameter."""
        chosen = contribution if self.samples is None else contribution.select(self.samples)
        self.accumulator.add(parameter, chosen)

    def take_stacked(self, parameter: str, stacked: Stacked) -> bool:
        """Take several columns' contributions of one parameter; False where it has to have one after another."""
        return self.samples is None and self.accumulator.add_stacked(parameter, stacked)

    def take_residual(self, parameter: str, first: int, block: Tensor) -> None:
        """Take the residual's diagonals of samples from `first` on, [n, *p]."""
        if self.samples is None:
            self.accumulator.add_residual(parameter, first, block)
            return
        for place, n in enumerate(self.samples.tolist()):
            if first <= n < first + len(block):
                self.accumulator.add_residual(parameter, place, block[n - first][None])


def chosen_samples(request: Request, N: int) -> Sequence[int] | None:
    """The samples of N that a request picks; None for all.

    Raises:
        EngineError: `invalid_option` where the batch has no such sample.
    """
    indices = request.options.get("subsampling")
    if indices is None:
        return None
    if beyond := [n for n in indices if n >= N]:
        raise EngineError(
            "invalid_option",
            f"{request.label}'s subsampling names sample {beyond[0]}; the batch has {N} (0 … {N - 1})",
            param=f"{request.extension.name}.subsampling",
            remedy="name samples of this batch",
        )
    return list(indices)
