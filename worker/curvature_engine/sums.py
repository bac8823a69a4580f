"""Sums of what every operator of a run made of the batch, to compare the whole batch with its chunks.

Outputs alone do not tell whether chunks compute what the whole batch does: behind weights that are zero, anything
gives the same outputs, and other derivatives. What a sample has to itself adds up over chunks, and what all samples
share is the same in each of them; a value that mixes samples is neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature_engine.precision import is_reduced

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


def tolerance_of(dtype: torch.dtype) -> float:
    """Of one number beside another of its kind that came about in another batch."""
    return HALF_TOLERANCE if is_reduced(dtype) else TOLERANCE.get(dtype, HALF_TOLERANCE)


_PIECE_ELEMENTS = 2**18


@dataclass(frozen=True)
class Sums:
    """Of one operator's result x.

    Attributes:
        place: the operator and where it stands, for messages.
        values: Σ x, Σ |x|, Σ x², as plain numbers: tensors kept among large ones would keep memory from going back.
    """

    place: str
    dtype: torch.dtype
    values: tuple[float, float, float]

    @classmethod
    def of(cls, x: Tensor, place: str) -> "Sums | None":
        """Those of a tensor of real or complex numbers; None for any other."""
        if not (x.is_floating_point() or x.is_complex()) or not x.numel():
            return None
        x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        total = magnitude = square = 0.0
        for piece in _pieces(x):
            part = piece.double()
            total += float(part.sum())
            magnitude += float(part.abs().sum())
            square += float(torch.dot(part.reshape(-1), part.reshape(-1)))
        return cls(place, x.dtype, (total, magnitude, square))

    def is_sum_of(self, parts: "Sequence[Sums]") -> bool:
        """Whether those of the parts add up to these."""
        return self._are([sum(values) for values in zip(*(p.values for p in parts), strict=True)])

    def is_each_of(self, parts: "Sequence[Sums]") -> bool:
        """Whether those of each part are these."""
        return all(self._are(p.values) for p in parts)

    def _are(self, values: Sequence[float]) -> bool:
        total, magnitude, square = self.values
        if not math.isfinite(square):
            return True  # a mask of infinities; what comes of it is finite
        sizes, tolerance = (magnitude, magnitude, square), tolerance_of(self.dtype)
        return all(
            abs(found - expected) <= tolerance * size
            for found, expected, size in zip(values, (total, magnitude, square), sizes, strict=True)
        )


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of `x`, none so large that a copy of it in float64 would matter."""
    if x.numel() <= _PIECE_ELEMENTS:
        return (x,)
    axis = max(range(x.dim()), key=lambda a: x.shape[a])
    return torch.split(x, max(1, x.shape[axis] * _PIECE_ELEMENTS // x.numel()), axis)


def first_difference(whole: Sequence[Sums], chunks: Sequence[Sequence[Sums]]) -> str | None:
    """The place of the first value that neither adds up over chunks nor is the same in each of them."""
    if any(len(chunk) != len(whole) for chunk in chunks):
        return "the number of operators"
    for expected, *parts in zip(whole, *chunks, strict=True):
        if not expected.is_sum_of(parts) and not expected.is_each_of(parts):
            return str(expected.place)
    return None
