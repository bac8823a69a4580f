"""Sums of products with one weight, as `einsum` writes them: batched and general matrix products, bilinear layers.

Axes have letters. Rows are the output's axes that the weight does not have. The weight's gradient is the same sum of
products, with the output's gradient in the weight's place.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from curvature_engine.rules.base import Match, Rule, gives

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


class ContractionRule(Rule):
    """y = Σ w ⊙ x ⊙ …, and maybe + b along the output's axes that are no rows.

    Args:
        weight: the weight's axes.
        others: the axes of each saved operand.
        output: the output's axes.
        sizes: of every axis.
    """

    def __init__(self, weight: str, others: Sequence[str], output: str, sizes: Mapping[str, int]) -> None:
        self._weight, self._others, self._output, self._sizes = weight, others, output, sizes
        self._rows = "".join(a for a in output if a not in weight)
        self.row_axes = len(self._rows)

    def canonical(self, g: Tensor) -> Tensor:
        return g.permute([self._output.index(a) for a in self._rows + self._rest(self._output)])

    def rows(self, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._with_rows(x, axes) for x, axes in zip(saved, self._others, strict=True))

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        if role == "bias":
            return g.sum(1)
        n, t = [a for a in _LETTERS if a not in self._sizes][:2]
        operands = [n + t + self._rest(axes) for axes in (self._output, *self._others)]
        # Along an axis of its own, the weight is summed, and has the same gradient everywhere.
        found = "".join(a for a in self._weight if any(a in axes for axes in operands))
        gradient = torch.einsum(f"{','.join(operands)}->{n}{found}", g, *saved)
        for place, a in enumerate(self._weight):
            if a not in found:
                gradient = gradient.unsqueeze(place + 1)
        return gradient.expand(len(g), *(self._sizes[a] for a in self._weight))

    def multiply_adds(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        if role == "bias":
            return g.numel()
        within = prod(size for a, size in self._sizes.items() if a not in self._rows)
        return g.shape[0] * g.shape[1] * within * max(1, len(saved))

    def _rest(self, axes: str) -> str:
        return "".join(a for a in axes if a not in self._rows)

    def _with_rows(self, x: Tensor, axes: str) -> Tensor:
        """An operand with the rows' axes first, copied along those that it lacks."""
        order = [a for a in self._rows if a in axes] + list(self._rest(axes))
        x = x.permute([axes.index(a) for a in order])
        for place, a in enumerate(self._rows):
            if a not in axes:
                x = x.unsqueeze(place)
        return x.expand(*(self._sizes[a] for a in self._rows), *x.shape[len(self._rows) :])


@gives(ContractionRule)
def match_einsum(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`einsum(equation, tensors)` with one weight among them."""
    equation, operands = arguments[0], [a for a in arguments[1:] if isinstance(a, Tensor)]
    if not isinstance(equation, str) or len(watched) != 1:
        return None
    axes = _read(equation, operands, output)
    position = next(iter(watched))
    return None if axes is None else _match(axes[:-1], axes[-1], operands, position - 1, {position: "weight"}, output)


@gives(ContractionRule)
def match_batched_product(
    name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor
) -> Match | None:
    """`bmm(a, b)`, `mv(a, b)` and every `matmul(a, b)` of a tensor with more than one axis."""
    a, b = arguments[:2]
    if len(watched) != 1 or not watched.keys() <= {0, 1} or a.dim() < 2:
        return None
    position = next(iter(watched))
    if b.dim() == 1:
        axes = [_LETTERS[: a.dim()], _LETTERS[a.dim() - 1]]
        return _match(axes, axes[0][:-1], (a, b), position, {position: "weight"}, output)
    leading = max(a.dim(), b.dim()) - 2
    shared, (i, j, k) = _LETTERS[:leading], tuple(_LETTERS[leading : leading + 3])
    axes = [shared[leading - (a.dim() - 2) :] + i + j, shared[leading - (b.dim() - 2) :] + j + k]
    return _match(axes, shared + i + k, (a, b), position, {position: "weight"}, output)


@gives(ContractionRule)
def match_bilinear(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`bilinear(x, y, W, b)`."""
    x, y, weight = arguments[:3]
    if not watched.keys() <= {2, 3}:
        return None
    rows = _LETTERS[: output.dim() - 1]
    o, i, j = tuple(_LETTERS[output.dim() - 1 : output.dim() + 2])
    roles = {p: "weight" if p == 2 else "bias" for p in watched}
    return _match([rows + i, rows + j, o + i + j], rows + o, (x, y, weight), 2, roles, output)


def _match(
    axes: Sequence[str],
    output_axes: str,
    operands: Sequence[Tensor],
    weight: int,
    roles: Mapping[int, str],
    output: Tensor,
) -> Match | None:
    """The rule for operands with these axes; None where it has none."""
    named = [*zip(axes, operands, strict=True), (output_axes, output)]
    sizes: dict[str, int] = {}
    for names, tensor in named:
        if len(names) != tensor.dim() or len(set(names)) < len(names):
            return None
        for a, size in zip(names, tensor.shape, strict=True):
            sizes[a] = max(size, sizes.get(a, size))
    if any(
        sizes[a] != size
        for place in (weight, -1)
        for a, size in zip(named[place][0], named[place][1].shape, strict=True)
    ):
        return None  # an axis of one that is broadcast
    others = [_without_ones(names, t, sizes) for place, (names, t) in enumerate(named[:-1]) if place != weight]
    rule = ContractionRule(axes[weight], [names for names, _ in others], output_axes, sizes)
    return None if rule.row_axes < 1 else Match(rule, roles, tuple(t for _, t in others))


def _without_ones(names: str, tensor: Tensor, sizes: Mapping[str, int]) -> tuple[str, Tensor]:
    """An operand without its axes of one that are broadcast."""
    wide = [place for place, a in enumerate(names) if tensor.shape[place] == sizes[a]]
    return "".join(names[place] for place in wide), tensor.reshape([tensor.shape[place] for place in wide])


def _read(equation: str, operands: Sequence[Tensor], output: Tensor) -> list[str] | None:
    """The axes of the operands and of the output, with letters for what `...` stands for; None where unclear."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    names = left.split(",")
    if len(names) != len(operands):
        return None
    letters = "".join(names).replace(".", "")
    if not arrow:
        right = "..." * ("..." in left) + "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    widest = max(t.dim() - len(n.replace("...", "")) for n, t in zip(names, operands, strict=True))
    free = "".join(a for a in _LETTERS if a not in letters)[:widest]
    found = []
    for n, tensor in [*zip(names, operands, strict=True), (right, output)]:
        hidden = tensor.dim() - len(n.replace("...", ""))
        if hidden < 0 or hidden > widest:
            return None
        found.append(n.replace("...", free[widest - hidden :]))
    return found
