"""Σ over samples of squared sums of outer products, as a Triton kernel: no gradient of a sample is written.

Each program owns a tile of the result and a share of the samples. It makes a sample's tile of the product in registers,
squares it there, and adds it to its own sum; shares are added at the end in one order, so that equal calls have equal
results.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvature_engine.kernels.choice import on_device_of
from curvature_engine.precision import accumulation_dtype, current

_TILE = 64
_PROGRAMS = 512
"""How many are wanted at once: a few for each multiprocessor of a large GPU."""
_PARTIAL_NUMBERS = 2**24
TRITON_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit  # type: ignore[untyped-decorator]
def _squares(
    left: tl.tensor,
    right: tl.tensor,
    partial: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    rows: tl.tensor,
    samples: tl.tensor,
    columns: tl.tensor,
    share: tl.tensor,
    left_v: tl.tensor,
    left_n: tl.tensor,
    left_r: tl.tensor,
    left_a: tl.tensor,
    right_n: tl.tensor,
    right_r: tl.tensor,
    right_b: tl.tensor,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    NARROWED: tl.constexpr,
) -> None:
    """partial[s, a, b] = Σ_v Σ_{n in share s} (Σ_r left[v, n, r, a] right[n, r, b])²."""
    a = tl.program_id(0) * TILE + tl.arange(0, TILE)
    b = tl.program_id(1) * TILE + tl.arange(0, TILE)
    s = tl.program_id(2)
    depth = tl.arange(0, DEPTH)
    first = s * share
    last = tl.minimum(first + share, samples)
    left += first.to(tl.int64) * left_n
    right += first.to(tl.int64) * right_n
    total = tl.zeros((TILE, TILE), dtype=TOTAL)
    for _n in range(first, last):
        column = left
        for _v in range(0, columns):
            product = tl.zeros((TILE, TILE), dtype=TOTAL)
            for start in range(0, rows, DEPTH):
                r = start + depth
                inside = r < rows
                x = tl.load(
                    column + a[:, None] * left_a + r[None, :] * left_r,
                    mask=(a[:, None] < A) & inside[None, :],
                    other=0.0,
                )
                y = tl.load(
                    right + r[:, None] * right_r + b[None, :] * right_b,
                    mask=inside[:, None] & (b[None, :] < B),
                    other=0.0,
                )
                if NARROWED:
                    x = x.to(tl.bfloat16)
                    y = y.to(tl.bfloat16)
                product = tl.dot(x, y, product, input_precision=PRECISION, out_dtype=TOTAL)
            total += product * product
            column += left_v
        left += left_n
        right += right_n
    place = partial + s.to(tl.int64) * A * B + a[:, None] * B + b[None, :]
    tl.store(place, total, mask=(a[:, None] < A) & (b[None, :] < B))


def sum_of_squares(left: Tensor, right: Tensor) -> Tensor:
    """Σ_v Σ_n (Σ_r l rᵀ)², left [n, r, a] or [v, n, r, a], right [n, r, b] → [a, b], at least in float32.

    Any strides serve.
    """
    left = left[None] if left.dim() == 3 else left
    columns, samples, rows, a = left.shape
    b = right.shape[2]
    dtype = accumulation_dtype(left.dtype)
    tiles = -(-a // _TILE) * -(-b // _TILE)
    most = max(1, min(samples, 65_535, _PARTIAL_NUMBERS // (a * b)))
    share = -(-samples // min(most, max(1, _PROGRAMS // tiles)))
    shares = -(-samples // share)
    partial = left.new_empty(shares, a, b, dtype=dtype)
    with on_device_of(left):
        _squares[(-(-a // _TILE), -(-b // _TILE), shares)](
            left,
            right,
            partial,
            a,
            b,
            rows,
            samples,
            columns,
            share,
            *left.stride(),
            *right.stride(),
            TILE=_TILE,
            DEPTH=16 if rows <= 16 else 32,
            TOTAL=TRITON_DTYPES[dtype],
            **arithmetic(left.dtype),
        )
    return partial[0] if shares == 1 else partial.sum(0)


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """How a kernel multiplies: as the analysis in progress was asked to."""
    precision = current()
    return {
        "PRECISION": "tf32" if precision == "tf32" and dtype == torch.float32 else "ieee",
        "NARROWED": precision == "bf16" and dtype == torch.float32,
    }
