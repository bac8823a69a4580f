"""Products with a weight matrix: linear, addmm, matmul, mm."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.matrix_products import product_of_columns
from curvature_engine.reductions import LEAST_SHARE, Moments, Outer, write_outer
from curvature_engine.rules.base import Match, Rule, gives
from curvature_engine.rules.gram import Gram, gram_multiply_adds
from curvature_engine.speculation import answer

_BLOCK_NUMBERS = 2**19
"""Of a result that is made in several steps: what two cores' own caches hold beside its intermediates."""


class LinearRule(Rule):
    """y = α x Wᵀ + β b on rows x [in] → y [out]; the weight is stored as [out, in], or transposed as [in, out]."""

    channel_axis = 1

    def __init__(
        self, row_axes: int, *, transposed: bool, swapped: bool = False, alpha: float = 1, beta: float = 1
    ) -> None:
        self.row_axes = row_axes
        self.inputs_first = transposed
        self._swapped = swapped  # y = W x: rows stand along the last axis
        self._alpha, self.bias_scale = alpha, beta

    def canonical(self, g: Tensor) -> Tensor:
        return g.transpose(-1, -2) if self._swapped else g

    def rows(self, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(x.transpose(-1, -2) for x in saved) if self._swapped else tuple(saved)

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        if role == "bias":
            return self._scaled(g.sum(1), self.bias_scale)
        x = saved[0]
        product = torch.bmm(x.transpose(1, 2), g) if self.inputs_first else torch.bmm(g.transpose(1, 2), x)
        return self._scaled(product, self._alpha)

    def outer(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Outer | None:
        if role == "bias" or g.shape[1] != 1:
            return None
        return Outer(self._scaled(saved[0][:, 0], self._alpha), g[:, 0], self.inputs_first)

    def per_sample_into(self, role: str, saved: Sequence[Tensor], g: Tensor, out: Tensor) -> bool:
        if role == "bias" or self._alpha != 1:
            return False
        left, right = (saved[0], g) if self.inputs_first else (g, saved[0])
        if g.shape[1] == 1:
            write_outer(left[:, 0], right[:, 0], out)
        else:
            torch.bmm(left.transpose(1, 2), right, out=out)
        return True

    def into_elements(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        return 0

    def add_per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor, out: Tensor) -> None:
        if role == "bias":
            super().add_per_sample(role, saved, g, out)
            return
        left, right = (saved[0], g) if self.inputs_first else (g, saved[0])
        out.baddbmm_(left.transpose(1, 2), right, alpha=self._alpha)

    def products(
        self, role: str, saved: Sequence[Tensor], g: Tensor, unfolded: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]] | None:
        if self.by_position(role, g) is None:
            return None
        return iter([(saved[0], g) if self.inputs_first else (g, saved[0])])

    def by_position(self, role: str, g: Tensor) -> Tensor | None:
        if role == "bias" or self._alpha != 1 or g.shape[1] == 1:  # of one row, `sum_squared` has a shorter form
            return None
        return g

    def inputs_by_position(self, role: str, saved: Sequence[Tensor]) -> Tensor | None:
        return None if role == "bias" or self._alpha != 1 else saved[0]

    def multiply_adds(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        return g.numel() if role == "bias" else g.numel() * saved[0].shape[-1]

    def norms_multiply_adds(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        return g.numel() if role == "bias" else (g.numel() + saved[0].numel()) * g.shape[1]

    def sum_squared(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        if role == "bias":
            return self._scaled(g.sum(1), self.bias_scale).square().sum(0)
        x = saved[0]
        if x.shape[1] != 1:
            return None
        x, g = x[:, 0].square(), g[:, 0].square()
        left, right = (x, g) if self.inputs_first else (g, x)
        found = product_of_columns(left, right)
        return found if self._alpha == 1 else found.mul_(self._alpha**2)

    def squared_norms(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        if role == "bias":
            return self._scaled(g.sum(1), self.bias_scale).square().sum(1)
        x = saved[0]
        if x.shape[1] == 1:
            return self._scaled(x.square().sum((1, 2)) * g.square().sum((1, 2)), self._alpha**2)
        if not self.is_reduced("squared_norms", role, saved, g):
            return None
        # ‖Σ_t g_t x_tᵀ‖² = Σ_{t,u} ⟨g_t, g_u⟩⟨x_t, x_u⟩ (Goodfellow 2015, extended to rows)
        gram = torch.bmm(x, x.transpose(1, 2)) * torch.bmm(g, g.transpose(1, 2))
        return self._scaled(gram.sum((1, 2)), self._alpha**2)

    def is_reduced(self, reduction: str, role: str, saved: Sequence[Tensor], g: Tensor) -> bool:
        if role == "bias" or g.shape[1] == 1:
            return True
        T, n_in, n_out = g.shape[1], saved[0].shape[2], g.shape[2]
        return reduction == "squared_norms" and T * (n_in + n_out) < n_in * n_out

    def moments(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Moments | None:
        """Of rows x and g, one for each sample, from products over the samples.

        Σ (g x − mean)² = Σ g² x² − n mean², unless that is a small difference of large sums somewhere. Then from what
        is centred first: with g = ḡ + δ and x = x̄ + ε, g x − mean = ḡ ε + δ x̄ + (δ ε − C), C = Σ δ ε/n.
        """
        if role == "bias" or saved[0].shape[1] != 1:
            return None
        left, right = (saved[0], g) if self.inputs_first else (g, saved[0])
        a, b = self._scaled(left[:, 0], self._alpha), right[:, 0]
        # To look would make the host wait for a device, which costs more than the further products.
        found = None if a.is_cuda else _uncentred(a, b)
        return Moments(product_of_columns(a, b).div_(len(a)), _centred(a, b)) if found is None else found

    def factor_inputs(self, saved: Sequence[Tensor]) -> Tensor | None:
        return self._scaled(saved[0], self._alpha)[None] if saved else None

    def input_positions(self, saved: Sequence[Tensor]) -> int:
        return 1

    def input_moment(self, saved: Sequence[Tensor], budget_bytes: int) -> Tensor | None:
        return self.scaled_input_moment(saved, budget_bytes, 1)

    def scaled_input_moment(self, saved: Sequence[Tensor], budget_bytes: int, factor: float) -> Tensor | None:
        if not saved:
            return None
        rows = saved[0].flatten(0, 1)[None]
        total = Gram(1, rows.shape[2], rows.shape[1], rows, factor * self._alpha**2)
        total.add(rows)
        return total.finish()

    def input_moment_cost(self, saved: Sequence[Tensor], budget_bytes: int) -> tuple[int, int]:
        n, T, width = saved[0].shape
        return gram_multiply_adds(1, width, n * T, saved[0].device), 0

    def input_sums(self, saved: Sequence[Tensor], budget_bytes: int) -> Tensor | None:
        return self._scaled(_sum_of_rows(saved[0]), self._alpha)[None] if saved else None

    def output_sums(self, role: str, g: Tensor) -> Tensor | None:
        return self._scaled(_sum_of_rows(g), self.bias_scale if role == "bias" else 1)[None]

    def factor_outputs(self, role: str, g: Tensor) -> Tensor | None:
        return (self._scaled(g, self.bias_scale) if role == "bias" else g)[None]

    @staticmethod
    def _scaled(value: Tensor, factor: float) -> Tensor:
        return value if factor == 1 else value * factor


def _sum_of_rows(x: Tensor) -> Tensor:
    """Σ over each sample's rows, [n, T, d] → [n, d]: of one row without a copy."""
    return x[:, 0] if x.shape[1] == 1 else x.sum(1)


def _uncentred(a: Tensor, b: Tensor) -> Moments | None:
    """Mean and Σ a² b² − n mean² over rows a [n, i], b [n, j]; None where that loses too much somewhere.

    A few rows of the result at a time, which stay in the cache while they are made.
    """
    n, shape = len(a), (a.shape[1], b.shape[1])
    mean, spread = pages.blank(shape, a), pages.blank(shape, a)
    scaled, a2, b2 = a / n, a.square(), b.square()
    height = 1 << (max(1, _BLOCK_NUMBERS // max(1, shape[1])).bit_length() - 1)  # so that parts of it are alike
    for first in range(0, shape[0], height):
        rows = slice(first, first + height)
        part = product_of_columns(scaled[:, rows], b, out=mean[rows])
        second = product_of_columns(a2[:, rows], b2)
        centred = torch.addcmul(second, part, part, value=-n, out=spread[rows])
        # What is no number fails, too.
        if second.numel() and not answer(second.mul_(LEAST_SHARE).sub_(centred).amax() <= 0):
            return None
    return Moments(mean, spread)


def _centred(a: Tensor, b: Tensor) -> Tensor:
    """Σ (a b − mean)² over rows a [n, i], b [n, j], from their deviations from their own means: [i, j]."""
    a0, b0 = a.mean(0), b.mean(0)
    da, db = a - a0, b - b0
    n, a0, b0 = len(a), a0[:, None], b0[None, :]
    a2, b2 = da.square(), db.square()
    covariance = da.T @ db
    spread = a2.T @ b2
    spread += a0.square() * b2.sum(0) + b0.square() * a2.sum(0)[:, None] + 2 * a0 * b0 * covariance
    spread += 2 * (a0 * (da.T @ b2) + b0 * (a2.T @ db))
    return spread.addcmul_(covariance, covariance, value=-1 / n).clamp_(min=0)


@gives(LinearRule)
def match_linear(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`linear(x, W, b)`."""
    if not watched.keys() <= {1, 2} or arguments[1].dim() != 2 or output.dim() < 2:
        return None
    return _match(LinearRule(output.dim() - 1, transposed=False), watched, arguments[0], weight=1, bias=2)


@gives(LinearRule)
def match_addmm(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`addmm(b, x, W, beta, alpha)` with W [in, out], as in `Conv1D` of language models."""
    if not watched.keys() <= {0, 2} or (0 in watched and tuple(arguments[0].shape) != tuple(output.shape[1:])):
        return None
    beta, alpha = (*arguments[3:], 1, 1)[:2]
    return _match(LinearRule(1, transposed=True, alpha=alpha, beta=beta), watched, arguments[1], weight=2, bias=0)


@gives(LinearRule)
def match_matmul(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`matmul(x, W)` and `matmul(W, x)` with a two-dimensional W."""
    a, b = arguments[:2]
    if watched.keys() == {1} and b.dim() == 2 and a.dim() >= 2:
        return _match(LinearRule(output.dim() - 1, transposed=True), watched, a, weight=1)
    if watched.keys() == {0} and a.dim() == 2 and b.dim() >= 2:
        return _match(LinearRule(output.dim() - 1, transposed=False, swapped=True), watched, b, weight=0)
    return None


def _match(rule: Rule, watched: Mapping[int, Any], x: Tensor, *, weight: int, bias: int = -1) -> Match:
    roles = {p: "weight" if p == weight else "bias" for p in watched if p in (weight, bias)}
    return Match(rule, roles, (x,) if weight in watched else ())
