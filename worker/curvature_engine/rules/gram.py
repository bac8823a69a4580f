"""Sums of products of rows: Σ l rᵀ, and Σ x xᵀ at little more than half its multiplications."""

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.matrix_products import product_of_columns

_BLOCKS = 4
_NARROWEST = 64
_FEWEST_ROWS = {"cpu": 128, "cuda": 1024}
_FEWEST_MULTIPLY_ADDS = 2**26
"""Below, several small products take longer than one."""
_WIDEST = 32
"""In rows: to fill in the mirror image of what is wider costs as much as it saves."""


def add_product(left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
    """Σ l rᵀ over rows, [groups, rows, d] and [groups, rows, e] → [groups, d, e]; added to `total` where one is given.

    Rows may have any stride.
    """
    if total is None:
        total = pages.blank((len(left), left.shape[2], right.shape[2]), left)
        if len(left) != 1:
            return torch.bmm(left.mT, right, out=total)
        product_of_columns(left[0], right[0], out=total[0])
    elif len(left) != 1:
        total.baddbmm_(left.mT, right)
    else:
        total[0].addmm_(left[0].T, right[0])
    return total


class Gram:
    """Σ x xᵀ of many rows, which may come in blocks; only the lower triangle of its blocks is multiplied out.

    Args:
        rows: how many will come.
        like: whose dtype and device it has.
        factor: what the sum is multiplied by.
    """

    def __init__(self, groups: int, width: int, rows: int, like: Tensor, factor: float = 1) -> None:
        self._factor = factor
        self._step = max(_NARROWEST, -(-width // _BLOCKS)) if _halved(groups, width, rows, like.device) else width
        self._total = pages.blank((groups, width, width), like)
        self._empty = True

    def add(self, x: Tensor) -> None:
        """Add rows [groups, rows, width]."""
        beta = 0 if self._empty else 1
        self._empty = False
        if len(x) != 1:
            self._total.baddbmm_(x.mT, x, beta=beta, alpha=self._factor)
            return
        if self._step >= x.shape[2]:
            self._total[0].addmm_(x[0].T, x[0], beta=beta, alpha=self._factor)
            return
        for i in range(0, x.shape[2], self._step):
            left, right = x[0, :, i:].T, x[0, :, i : i + self._step]
            self._total[0, i:, i : i + self._step].addmm_(left, right, beta=beta, alpha=self._factor)

    def finish(self) -> Tensor:
        """The sum, [groups, width, width]."""
        if self._empty:
            return self._total.zero_()
        for i in range(self._step, self._total.shape[1], self._step):
            self._total[:, :i, i : i + self._step] = self._total[:, i : i + self._step, :i].mT
        return self._total


def add_gram(rows: Tensor, total: Tensor | None = None) -> Tensor:
    """Σ x xᵀ over rows, [groups, rows, d] → [groups, d, d]; added to `total` where one is given."""
    groups, n, width = rows.shape
    if not _halved(groups, width, n, rows.device):
        return add_product(rows, rows, total)
    gram = Gram(groups, width, n, rows)
    gram.add(rows)
    found = gram.finish()
    return found if total is None else total.add_(found)


def _halved(groups: int, width: int, rows: int, device: torch.device) -> bool:
    if groups != 1 or rows < _FEWEST_ROWS.get(device.type, _FEWEST_ROWS["cuda"]):
        return False
    return rows * width**2 >= _FEWEST_MULTIPLY_ADDS and 2 * _NARROWEST <= width <= _WIDEST * rows


def gram_multiply_adds(groups: int, width: int, rows: int, device: torch.device) -> int:
    """How many multiplications and additions `Gram` takes."""
    blocks = -(-width // max(_NARROWEST, -(-width // _BLOCKS))) if _halved(groups, width, rows, device) else 1
    return groups * rows * width * width * (blocks + 1) // (2 * blocks)
