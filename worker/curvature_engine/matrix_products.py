"""Products of matrices, in the form in which threads share them well."""

import torch
from torch import Tensor

from curvature_engine import pages

_LEAST_NUMBERS = 2**13
"""Of a result: smaller ones take longer in parts."""
_PARTS = 2
"""Of a result, for every thread."""


def product_of_columns(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Σ_n l rᵀ, [n, a] and [n, b] → [a, b]; written to `out`, which is contiguous, where one is given.

    MKL has threads share a product of few long rows badly: two cores of AMD's take up to four times as long for it as
    for its transpose (512 x 1152 from 32 samples). So parts of its rows are made side by side there.
    """
    a, b = left.shape[1], right.shape[1]
    result = pages.blank((a, b), left) if out is None else out
    parts = _PARTS * torch.get_num_threads() if result.is_cpu else 1
    if parts == _PARTS or b <= 2 * a or a * b < _LEAST_NUMBERS or a % parts:
        return torch.mm(left.T, right, out=result)
    rows = left.T.view(parts, a // parts, len(left))
    torch.bmm(rows, right.expand(parts, -1, -1), out=result.view(parts, -1, b))
    return result
