"""Parameters put beside a batch: class tokens, learned prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvature_engine.rules.base import Match, Rule, gives


class ConcatenationRule(Rule):
    """A piece's gradient is its part of the output's; the piece is the same for every sample.

    Args:
        axis: of the output, along which pieces follow each other.
        parts: role → (start, length) along that axis.
    """

    row_axes = 1

    def __init__(self, axis: int, parts: Mapping[str, tuple[int, int]]) -> None:
        self._axis, self._parts = axis, parts

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        start, length = self._parts[role]
        return g.sum(1, keepdim=True).narrow(self._axis + 1, start, length)


@gives(ConcatenationRule)
def match_concatenation(
    name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor
) -> Match | None:
    """`cat(tensors, axis)`, not along the first axis; parameters expanded over the batch."""
    *pieces, axis = arguments
    if not isinstance(axis, int) or not isinstance(pieces[0], Tensor):
        return None
    axis = axis % output.dim()
    if axis == 0 or not all(watched[p].rows_alike for p in watched) or any(p.dim() != output.dim() for p in pieces):
        return None
    parts, start = {}, 0
    for place, piece in enumerate(pieces):
        parts[str(place)] = (start, piece.shape[axis])
        start += piece.shape[axis]
    return Match(ConcatenationRule(axis, parts), {p: str(p) for p in watched}, (), dict.fromkeys(watched, "first row"))
