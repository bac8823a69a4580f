"""Sums of what every operator of a run made of the batch, to compare the whole batch with its chunks.

Outputs alone do not tell whether chunks compute what the whole batch does: behind weights that are zero, anything
gives the same outputs, and other derivatives. What a sample has to itself adds up over chunks, and what all samples
share is the same in each of them; a value that mixes samples is neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Sums:
    """Of one operator's result x.

    Attributes:
        place: the operator and where it stands, for messages.
        values: Σ x, Σ |x|, Σ x², [3] in float64.
    """

    place: str
    dtype: torch.dtype
    values: Tensor

    @classmethod
    def of(cls, x: Tensor, place: str) -> "Sums | None":
        """Those of a tensor of real or complex numbers; None for any other."""
        if not (x.is_floating_point() or x.is_complex()) or not x.numel():
            return None
        x = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()
        magnitude = torch.linalg.vector_norm(x, 1, dtype=torch.float64)
        square = torch.linalg.vector_norm(x, 2, dtype=torch.float64).square()
        return cls(place, x.dtype, torch.stack([x.sum(dtype=torch.float64), magnitude, square]))


def first_difference(whole: Sequence[Sums], chunks: Sequence[Sequence[Sums]]) -> str | None:
    """The place of the first value that neither adds up over chunks nor is the same in each of them."""
    if any(len(chunk) != len(whole) for chunk in chunks):
        return "the number of operators"
    for i, expected in enumerate(whole):
        parts = torch.stack([chunk[i].values for chunk in chunks])
        tolerance = TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
        allowed = tolerance * expected.values[[1, 1, 2]]
        if not bool(torch.isfinite(expected.values).all()):
            continue  # a mask of infinities; what comes of it is finite
        adds_up = bool(((parts.sum(0) - expected.values).abs() <= allowed).all())
        if not adds_up and not bool(((parts - expected.values).abs() <= allowed).all()):
            return expected.place
    return None
