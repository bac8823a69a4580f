"""Sums over individual gradients, made while these are at hand: a block of samples, one piece of the parameter.

A *piece* is a part of a parameter's elements in whatever order is cheapest to make (`Rule.pieces`); what a reduction
holds of each becomes a tensor of the parameter's shape at the end (`Rule.assemble`). Several reductions share one sweep
over the gradients, so that these are made once and reduced while they lie in the cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.kernels import choice
from curvature_engine.matrix_products import product_of_columns

Assemble = Callable[[list[Tensor]], Tensor]
Take = Callable[[int, Tensor], None]
"""Takes a sample's number and a piece of its gradient."""

LEAST_SHARE = 2.0**-5
"""Of the second moment, below which a spread is not taken from the difference: it would lose more than five bits."""
_BY_ROWS_FROM = 8192
"""Elements from which adding row by row, in one pass over memory each, beats working on a whole block."""


class Moments(NamedTuple):
    """Of n individual gradients: Σ g/n and Σ (g − mean)², [*p] each."""

    mean: Tensor
    spread: Tensor


class Outer(NamedTuple):
    """Individual gradients as outer products of `kept` [N, i], the same for every column, and `column` [N, j].

    Attributes:
        turned: whether the parameter is [i, j]; else it is [j, i].
    """

    kept: Tensor
    column: Tensor
    turned: bool

    def squared(self) -> "Outer":
        """That of the squares."""
        return self._replace(kept=self.kept.square(), column=self.column.square())

    def sum(self) -> Tensor:
        """Σ over the samples, [*p]."""
        left, right = (self.kept, self.column) if self.turned else (self.column, self.kept)
        return product_of_columns(left, right)

    def write_into(self, out: Tensor) -> None:
        """All samples' products, into [N, *p]."""
        left, right = (self.kept, self.column) if self.turned else (self.column, self.kept)
        write_outer(left, right, out)

    def rows(self, first: int, stop: int) -> Tensor:
        """Some samples' products, [n, *p]."""
        left, right = (self.kept, self.column) if self.turned else (self.column, self.kept)
        return left[first:stop, :, None] * right[first:stop, None]


def write_outer(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write each sample's product of left [n, i] and right [n, j] into out [n, i, j]."""
    columns, rows = left[:, :, None], right[:, None]
    if out.device.type == "cpu" and _stores_past_caches():
        torch.bmm(columns, rows, out=out)
    else:
        torch.mul(columns, rows, out=out)


@cache
def _stores_past_caches() -> bool:
    """Whether many products at once are written past the caches here, in two thirds of the time that mul takes.

    So MKL does on Intel's CPUs; on AMD's it takes other ways, and mul half to two thirds of its time.
    """
    tell = getattr(torch.cpu, "get_capabilities", None)  # newer versions of torch have it
    maker = "" if tell is None else str(tell().get("cpu_name", ""))
    return bool(torch._C.has_mkl) and not maker.startswith("AMD")


class Reduction(ABC):
    """Takes the pieces of one block after another."""

    @abstractmethod
    def add(self, first: int, piece: int, gradients: Tensor) -> None:
        """Take the samples `first` … `first + n`: [n, *piece]; they must not be changed."""

    def taker(self, piece: int, like: Tensor) -> Take:
        """What takes a piece of one sample after another: `add` for many small ones, each like `like` [*piece]."""
        return lambda sample, gradient: self.add(sample, piece, gradient[None])

    @abstractmethod
    def result(self, assemble: Assemble) -> Tensor | Moments | None:
        """What came of all; None where that would not be exact enough."""


class SumSquared(Reduction):
    """Σ g²: [*p]."""

    def __init__(self) -> None:
        self.pieces: list[Tensor] = []

    def add(self, first: int, piece: int, gradients: Tensor) -> None:
        if piece == len(self.pieces):
            self.pieces.append(pages.zeros_like(gradients[0]))
        add_squares(self.pieces[piece], gradients)

    def add_sums(self, sums: Sequence[Tensor]) -> None:
        """Take Σ g² of every piece."""
        for piece, found in enumerate(sums):
            self.add_to(piece, found)

    def add_to(self, piece: int, found: Tensor) -> None:
        """Take Σ g² of one piece."""
        if piece == len(self.pieces):
            self.pieces.append(found)
        else:
            self.pieces[piece].add_(found)

    def taker(self, piece: int, like: Tensor) -> Take:
        if piece == len(self.pieces):
            self.pieces.append(pages.zeros_like(like))
        total = self.pieces[piece]

        def take(sample: int, gradient: Tensor) -> None:
            total.addcmul_(gradient, gradient)

        return take

    def result(self, assemble: Assemble) -> Tensor:
        return assemble(self.pieces)


class SquaredNorms(Reduction):
    """‖g‖² of each sample: [N]."""

    def __init__(self) -> None:
        self._norms: dict[int, Tensor] = {}

    def add(self, first: int, piece: int, gradients: Tensor) -> None:
        self._add(first, squared_norms(gradients))

    def taker(self, piece: int, like: Tensor) -> Take:
        def take(sample: int, gradient: Tensor) -> None:
            norm: Tensor = torch.linalg.vector_norm(gradient)
            self._add(sample, norm.square_()[None])

        return take

    def _add(self, first: int, norms: Tensor) -> None:
        self._norms[first] = self._norms[first] + norms if first in self._norms else norms

    def result(self, assemble: Assemble) -> Tensor:
        return torch.cat([self._norms[first] for first in sorted(self._norms)])


class Total(Reduction):
    """Σ g: [*p]."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, first: int, piece: int, gradients: Tensor) -> None:
        part = gradients.sum(0)
        if piece == len(self._sums):
            self._sums.append(part)
        else:
            self._sums[piece].add_(part)

    def taker(self, piece: int, like: Tensor) -> Take:
        if piece == len(self._sums):
            self._sums.append(pages.zeros_like(like))
        total = self._sums[piece]

        def take(sample: int, gradient: Tensor) -> None:
            total.add_(gradient)

        return take

    def result(self, assemble: Assemble) -> Tensor:
        return assemble(self._sums)


class Spread(Reduction):
    """Mean and centred sum of squares, of groups of samples merged (Chan, Golub & LeVeque 1983, eq. 2.1).

    Centred before squaring: the difference of two large sums gave negative variances for near-duplicates. Of large
    pieces, groups are single samples (Welford 1962): three passes over memory each.
    """

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    def add(self, first: int, piece: int, gradients: Tensor) -> None:
        if piece == len(self._groups):
            like = gradients[0]
            self._groups.append(_Group(torch.zeros_like(like), torch.zeros_like(like)))
        group = self._groups[piece]
        if _by_rows(gradients[0]):
            group.add_rows(gradients)
        else:
            group.add_block(gradients)

    def result(self, assemble: Assemble) -> Moments:
        return Moments(assemble([g.mean for g in self._groups]), assemble([g.spread for g in self._groups]))


class UncentredSpread(Reduction):
    """Mean and centred sum of squares from Σ g and Σ g²: two passes over memory a sample.

    Its result is None where the spread would be a small difference of large sums somewhere; then it takes a `Spread`.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._n = 0

    def add(self, first: int, piece: int, gradients: Tensor) -> None:
        take = self.taker(piece, gradients[0])
        for sample, gradient in enumerate(gradients.unbind(), first):
            take(sample, gradient)

    def taker(self, piece: int, like: Tensor) -> Take:
        if piece == len(self._sums):
            self._sums.append((torch.zeros_like(like), torch.zeros_like(like)))
        total, squares = self._sums[piece]

        def take(sample: int, gradient: Tensor) -> None:
            self._n += piece == 0
            total.add_(gradient)
            squares.addcmul_(gradient, gradient)

        return take

    def result(self, assemble: Assemble) -> Moments | None:
        means, spreads = [], []
        for total, squares in self._sums:
            mean = total.div_(self._n)
            spread = torch.addcmul(squares, mean, mean, value=-self._n)
            if bool((spread < squares.mul_(LEAST_SHARE)).any()):
                return None
            means.append(mean)
            spreads.append(spread)
        return Moments(assemble(means), assemble(spreads))


class _Group:
    """Moments of the samples so far."""

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        self.n, self.mean, self.spread = 0, mean, spread
        self._own: Tensor | None = None

    def add_rows(self, gradients: Tensor) -> None:
        shift = self._own = torch.empty_like(self.mean) if self._own is None else self._own
        for row in gradients.unbind():
            torch.sub(row, self.mean, out=shift)
            self._shift(shift, 1)

    def add_block(self, gradients: Tensor) -> None:
        if gradients.device.type == "cpu":
            mean = gradients.mean(0)
            add_squares(self.spread, gradients - mean)
        else:
            mean, spread = _in_one_pass(gradients)
            self.spread.add_(spread)
        self._shift(mean.sub_(self.mean), len(gradients))

    def _shift(self, shift: Tensor, n: int) -> None:
        """Take in n samples whose mean is `shift` away."""
        before, self.n = self.n, self.n + n
        self.mean.add_(shift, alpha=n / self.n)
        self.spread.addcmul_(shift, shift, value=before * n / self.n)


def _in_one_pass(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and centred sum of squares of gradients [n, *p], by Welford's recurrence."""
    if choice.pays_for_spread(gradients):
        found = choice.guarded(partial(_by_kernel, gradients))
        if found is not None:
            return found[0], found[1]
    variance, mean = torch.var_mean(gradients, 0, correction=0)
    return mean, variance.mul_(len(gradients))


def _by_kernel(gradients: Tensor) -> Tensor:
    from curvature_engine.kernels.spread import mean_and_spread  # Triton is imported when it is first wanted

    return mean_and_spread(gradients)


REDUCTIONS: dict[str, type[Reduction]] = {
    "sum_squared": SumSquared,
    "squared_norms": SquaredNorms,
    "total": Total,
    "moments": Spread,
}


def add_squares(total: Tensor, gradients: Tensor) -> None:
    """Total [*p] += Σ_n gradients [n, *p] squared."""
    if _by_rows(total):
        for row in gradients.unbind():
            total.addcmul_(row, row)
    else:
        total.add_(squares_of_first(gradients, 1))


def _by_rows(like: Tensor) -> bool:
    return like.is_cpu and like.numel() >= _BY_ROWS_FROM


def squares_of_first(x: Tensor, axes: int) -> Tensor:
    """Σ over the first axes, of the squares."""
    if x.is_cpu:
        return x.square().sum(tuple(range(axes)))
    # Squares that are written out take two further passes over memory, and memory is what a GPU waits for here.
    norms: Tensor = torch.linalg.vector_norm(x, dim=tuple(range(axes)))
    return norms.square_()


def squared_norms(gradients: Tensor) -> Tensor:
    """Σ over all axes but the first, of the squares: [n]."""
    if gradients.dim() == 1:
        return gradients.square()
    # One pass over memory, where squaring first takes two.
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=tuple(range(1, gradients.dim())))
    return norms.square_()
