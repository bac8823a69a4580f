"""Parameters added to, subtracted from, multiplied with or divided by a batch: biases, scales, positional tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from curvature_engine.rules.base import Match, Rule, Through, gives


class ElementwiseRule(Rule):
    """y = factor · p ⊙ x (or factor · p + x), with p broadcast against the rows.

    The parameter's axes after its leading ones align with the output's last axes; axes of size one are summed over.

    Args:
        row_axes: how many leading axes are rows, after a permutation of the output's axes to `order`.
        shape: the parameter's.
        kept: what the parameter has along the other axes.
    """

    def __init__(
        self,
        row_axes: int,
        shape: Sequence[int],
        kept: Sequence[int],
        factor: float,
        *,
        product: bool,
        order: Sequence[int] = (),
    ) -> None:
        self.row_axes = row_axes
        self._shape, self._kept = tuple(shape), tuple(kept)
        self._factor, self._product = factor, product
        self._order = tuple(order)

    def canonical(self, g: Tensor) -> Tensor:
        return g.permute(self._order) if self._order else g

    def rows(self, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self.canonical(t) for t in saved)

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        value = (g * saved[0] if saved else g).sum(1)
        summed = [1 + axis for axis, size in enumerate(self._kept) if size == 1]
        value = value.sum(summed, keepdim=True) if summed else value
        value = value if self._factor == 1 else value * self._factor
        return value.reshape(g.shape[0], *self._shape)

    def factor_outputs(self, role: str, g: Tensor) -> Tensor | None:
        wide = [axis for axis, size in enumerate(self._kept) if size != 1]
        if self._product or len(wide) != 1:
            return None
        columns = g.movedim(2 + wide[0], -1).flatten(1, -2)
        return (columns if self._factor == 1 else columns * self._factor)[None]

    @classmethod
    def offers_factors(cls, operator: str) -> bool:
        return operator in ("add", "sub")


@gives(ElementwiseRule)
def match_elementwise(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`add`, `sub`, `mul`, `div` of a parameter and something of the batch."""
    if len(watched) != 1 or not watched.keys() <= {0, 1}:
        return None
    position = next(iter(watched))
    parameter, other = arguments[position], arguments[1 - position]
    if name == "div" and len(arguments) > 2 and arguments[2] is not None:  # rounded
        return None
    shape = tuple(parameter.shape)
    through: dict[int, Through] = {}
    if len(shape) == output.dim() and shape[0] > 1 and watched[position].rows_alike:
        shape, through = (1, *shape[1:]), {position: "first row"}
    if name == "div" and position == 1:
        if through:
            return None
        through = {1: "reciprocal"}
    kept = shape
    while kept and kept[0] == 1:
        kept = kept[1:]
    row_axes, order = output.dim() - len(kept), tuple[int, ...]()
    if row_axes < 1:
        row_axes, order = _inner_rows(kept, output.shape)
        kept = tuple(kept[axis] for axis in order[row_axes:])
    if row_axes < 1:
        return None
    product = name in ("mul", "div")
    alpha = arguments[2] if not product and len(arguments) > 2 else 1
    factor = (1 if position == 0 else alpha) * (-1 if name == "sub" and position == 1 else 1)
    if name == "div" and position == 0:
        other = other.reciprocal() if isinstance(other, Tensor) else 1 / other
    saved: tuple[Tensor, ...] = ()
    if product and isinstance(other, Tensor):
        saved = (other.expand(output.shape),)
    elif product:
        factor = other
    rule = ElementwiseRule(row_axes, shape, kept, factor, product=product, order=order)
    return Match(rule, {position: "bias"}, saved, through)


def _inner_rows(shape: Sequence[int], output: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(how many axes the parameter is broadcast along, all axes with those first)."""
    rows = [axis for axis, size in enumerate(shape) if size == 1 and output[axis] > 1]
    return len(rows), (*rows, *(axis for axis in range(len(shape)) if axis not in rows))


@gives(ElementwiseRule)
def match_prelu(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`prelu(x, slopes)`: linear in the slopes, with the negative part of x; one slope, or one per channel."""
    x, slopes = arguments[:2]
    if watched.keys() != {1} or x.dim() < 1:
        return None
    axes = x.dim() - 2
    kept = (slopes.numel(), *[1] * axes) if slopes.numel() > 1 else ()
    rule = ElementwiseRule(x.dim() - len(kept), tuple(slopes.shape), kept, 1, product=True)
    return Match(rule, {1: "slopes"}, (x.clamp(max=0),))
