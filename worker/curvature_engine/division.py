"""Dividing a batch into chunks, each with a forward pass of its own, where that is proved to change nothing.

A program may have the number of samples baked in, may decide something by the whole batch, may mix samples. So the
whole batch goes through once without a graph, and then every chunk must take the same decisions, read the same numbers
and return the whole batch's rows, and the values inside must add up. Which axis of an input the samples stand along is
found by trying. (That samples are not coupled in their derivatives either, the probe says of every chunk.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from curvature_engine.errors import EngineError, first_line, lacks_memory
from curvature_engine.execution import map_tensors
from curvature_engine.program import Forward, Inputs
from curvature_engine.sums import first_difference, tolerance_of

ATTEMPTS = 32
"""At finding the samples' axes."""

RunForward = Callable[[Inputs], Forward]
"""A forward pass without a graph."""
Select = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Division:
    """How a batch is divided.

    Attributes:
        bounds: first sample of every chunk, and N.
        forward_bytes: what the largest chunk's forward pass keeps.
        axes: of every input tensor, where the samples stand, or None for what all of them share.
        reason: why it is one chunk although that exceeds its share of the budget.
    """

    bounds: Sequence[int]
    forward_bytes: int
    axes: tuple[int | None, ...] = ()
    reason: str | None = None

    @property
    def sizes(self) -> list[int]:
        """Samples of every chunk."""
        return [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def largest(self) -> int:
        """Samples of the largest chunk: the first."""
        return self.sizes[0]

    def inputs(self, whole: Inputs, chunk: int) -> Inputs:
        """A chunk's inputs."""
        if len(self.bounds) == 2:
            return whole
        return narrowed(whole, self.axes, self.bounds[chunk], self.bounds[chunk + 1])


class Divider:
    """Divides one batch, whose whole forward pass is given."""

    def __init__(self, run: RunForward, select: Select, inputs: Inputs, whole: Forward) -> None:
        self._run, self._select, self._inputs, self._whole = run, select, inputs, whole
        self._outputs = select(whole.outputs)
        self._N = self._outputs.shape[0]

    def divide(self, samples: int, least: int) -> Division:
        """Chunks of at most `samples` samples, as equal as can be, and of at least `least`; or one, with the reason."""
        bounds = split(self._N, samples, least)
        one = Division((0, self._N), self._whole.kept_bytes)
        if len(bounds) == 2:
            return replace(one, reason=f"{self._N} samples leave no chunk of {least}, the fewest that can be probed")
        if self._whole.used_dropout:
            return replace(one, reason="dropout is active, and its mask is drawn for the whole batch")
        reason = "the inputs have no axis of as many samples"
        for axes in islice(candidate_axes(self._inputs, self._N), ATTEMPTS):
            division = Division(bounds, 0, axes)
            found, why = self._try(division, 0)
            if found is None:
                reason = why
                continue
            sums = [found.sums]
            for chunk in range(1, len(bounds) - 1):
                other, why = self._try(division, chunk)
                if other is None:
                    return replace(one, reason=why)
                sums.append(other.sums)
            if place := first_difference(self._whole.sums, sums):
                return replace(one, reason=f"chunks compute other values inside the model: {place}")
            return replace(division, forward_bytes=found.kept_bytes)
        return replace(one, reason=reason)

    def _try(self, division: Division, chunk: int) -> tuple[Forward | None, str]:
        """A chunk's forward pass if it is the whole batch's, else None and in what it differs."""
        start, stop = division.bounds[chunk : chunk + 2]
        which = f"samples {start} … {stop - 1} by themselves"
        try:
            forward = self._run(division.inputs(self._inputs, chunk))
            outputs = self._select(forward.outputs)
        except EngineError as error:
            if lacks_memory(error):
                raise
            return None, f"the model does not run on {which}: {first_line(error)}"
        if outputs.shape != (stop - start, *self._outputs.shape[1:]):
            return None, f"the model returns {list(outputs.shape)} for {which}: the number of samples may be baked in"
        if forward.decisions != self._whole.decisions:
            return None, f"the model decides otherwise on {which}"
        if not _same_numbers(forward.readings, self._whole.readings):
            return None, f"the model reads other numbers from {which}"
        if not same_rows(outputs, self._outputs[start:stop]):
            return None, f"the model returns other outputs for {which}"
        return forward, ""


def candidate_axes(inputs: Inputs, N: int) -> Iterator[tuple[int | None, ...]]:
    """Ways in which N samples may stand in the inputs, by tensor, the likeliest first; None for what all share."""
    choices: list[list[int | None]] = []

    def look(tensor: Tensor) -> Tensor:
        choices.append([*(a for a in (0, 1) if tensor.dim() > a and tensor.shape[a] == N), None])
        return tensor

    map_tensors(look, inputs)
    return (axes for axes in product(*choices) if any(axis is not None for axis in axes))


def split(N: int, samples: int, least: int) -> tuple[int, ...]:
    """Bounds of chunks of at most `samples` and at least `least`, as equal as can be, the larger ones first."""
    chunks = max(1, min(-(-N // max(1, samples)), N // max(1, least)))
    size, larger = divmod(N, chunks)
    bounds = [0]
    for chunk in range(chunks):
        bounds.append(bounds[-1] + size + (chunk < larger))
    return tuple(bounds)


def narrowed(inputs: Inputs, axes: Sequence[int | None], start: int, stop: int) -> Inputs:
    """Samples `start` … `stop` of the inputs."""
    order = iter(axes)

    def narrow(tensor: Tensor) -> Tensor:
        axis = next(order)
        if axis is None:
            return tensor
        part = tensor.narrow(axis, start, stop - start)
        return part.contiguous() if tensor.is_contiguous() else part

    found: Inputs = map_tensors(narrow, inputs)
    return found


def _same_numbers(found: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(found) == len(expected) and all(
        type(a) is type(b) and (a == b or (a != a and b != b)) for a, b in zip(found, expected, strict=True)
    )


def same_rows(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are one up to rounding."""
    if found.dtype != expected.dtype:
        return False
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(found), finite):
        return False
    size = expected.abs().nan_to_num(0.0, 0.0, 0.0).max() if expected.numel() else expected.new_zeros(())
    difference = torch.where(finite, found - expected, 0.0).abs()
    return bool((difference <= tolerance_of(expected.dtype) * size).all())
