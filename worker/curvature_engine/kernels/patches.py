"""Σ x xᵀ of a convolution's patches x, as a Triton kernel that reads the input where it lies.

Each program owns a tile of the result on or above the diagonal and a share of the positions; it finds its patches'
numbers in the image by their places. Shares are added at the end in one order.
"""

from math import prod
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from curvature_engine.kernels.choice import on_device_of
from curvature_engine.kernels.squares import TRITON_DTYPES, arithmetic
from curvature_engine.precision import accumulation_dtype

if TYPE_CHECKING:
    from curvature_engine.rules.convolution import Geometry

_TILE = 64
_DEPTH = 32
_PROGRAMS = 512
_PARTIAL_NUMBERS = 2**25
_AXES = 3


@triton.jit  # type: ignore[untyped-decorator]
def _moments(
    x: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    share: tl.tensor,
    shares: tl.tensor,
    width: tl.tensor,
    channels: tl.tensor,
    K0: tl.tensor,
    K1: tl.tensor,
    K2: tl.tensor,
    P0: tl.tensor,
    P1: tl.tensor,
    P2: tl.tensor,
    S0: tl.tensor,
    S1: tl.tensor,
    S2: tl.tensor,
    step0: tl.tensor,
    step1: tl.tensor,
    step2: tl.tensor,
    wide0: tl.tensor,
    wide1: tl.tensor,
    wide2: tl.tensor,
    before0: tl.tensor,
    before1: tl.tensor,
    before2: tl.tensor,
    x_u: tl.tensor,
    x_c: tl.tensor,
    x_0: tl.tensor,
    x_1: tl.tensor,
    x_2: tl.tensor,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    TOTAL: tl.constexpr,
    PRECISION: tl.constexpr,
    NARROWED: tl.constexpr,
) -> None:
    """partial[s, g, i, j] = Σ_{rows in share s} x[row, i] x[row, j], i and j = (channel, k0, k1, k2) of group g."""
    tile_i = tl.program_id(0)
    tile_j = tl.program_id(1)
    s = tl.program_id(2) % shares
    group = tl.program_id(2) // shares
    if tile_i <= tile_j:
        i = tile_i * TILE + tl.arange(0, TILE)
        j = tile_j * TILE + tl.arange(0, TILE)
        depth = tl.arange(0, DEPTH)
        x += (group * channels).to(tl.int64) * x_c
        i2 = i % K2 * wide2 - before2
        i1 = i // K2 % K1 * wide1 - before1
        i0 = i // (K2 * K1) % K0 * wide0 - before0
        j2 = j % K2 * wide2 - before2
        j1 = j // K2 % K1 * wide1 - before1
        j0 = j // (K2 * K1) % K0 * wide0 - before0
        at_i = i // (K0 * K1 * K2) * x_c + i0 * x_0 + i1 * x_1 + i2 * x_2
        at_j = j // (K0 * K1 * K2) * x_c + j0 * x_0 + j1 * x_1 + j2 * x_2
        total = tl.zeros((TILE, TILE), dtype=TOTAL)
        first = s * share
        last = tl.minimum(first + share, rows)
        for start in range(first, last, DEPTH):
            r = start + depth
            inside = r < last
            r2 = r % P2 * step2
            r1 = r // P2 % P1 * step1
            r0 = r // (P2 * P1) % P0 * step0
            at_r = (r // (P0 * P1 * P2)).to(tl.int64) * x_u + r0 * x_0 + r1 * x_1 + r2 * x_2
            a0 = i0[:, None] + r0[None, :]
            a1 = i1[:, None] + r1[None, :]
            a2 = i2[:, None] + r2[None, :]
            seen = (a0 >= 0) & (a0 < S0) & (a1 >= 0) & (a1 < S1) & (a2 >= 0) & (a2 < S2)
            left = tl.load(
                x + at_i[:, None] + at_r[None, :], mask=seen & (i[:, None] < width) & inside[None, :], other=0.0
            )
            b0 = r0[:, None] + j0[None, :]
            b1 = r1[:, None] + j1[None, :]
            b2 = r2[:, None] + j2[None, :]
            seen = (b0 >= 0) & (b0 < S0) & (b1 >= 0) & (b1 < S1) & (b2 >= 0) & (b2 < S2)
            right = tl.load(
                x + at_r[:, None] + at_j[None, :], mask=seen & inside[:, None] & (j[None, :] < width), other=0.0
            )
            if NARROWED:
                left = left.to(tl.bfloat16)
                right = right.to(tl.bfloat16)
            total = tl.dot(left, right, total, input_precision=PRECISION, out_dtype=TOTAL)
        place = partial + (s * (tl.num_programs(2) // shares) + group).to(tl.int64) * width * width
        inner = (i[:, None] < width) & (j[None, :] < width)
        tl.store(place + i[:, None] * width + j[None, :], total, mask=inner)
        if tile_i < tile_j:
            tl.store(place + j[None, :] * width + i[:, None], total, mask=inner)


def patch_moment(x: Tensor, geometry: "Geometry", positions: tuple[int, ...]) -> Tensor:
    """Σ over samples and positions, x [u, c, *space] of any strides → [groups, c/groups·k, c/groups·k].

    Patches hold the kernel's places last. At least in float32.
    """
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    width = channels * prod(geometry.kernel)
    rows = len(x) * prod(positions)
    dtype = accumulation_dtype(x.dtype)
    across = -(-width // _TILE)
    tiles = across * (across + 1) // 2 * groups
    most = max(1, min(-(-rows // _DEPTH), 65_535 // groups, _PARTIAL_NUMBERS // (groups * width * width)))
    share = -(-rows // min(most, max(1, _PROGRAMS // tiles)))
    shares = -(-rows // share)
    partial = x.new_empty(shares, groups, width, width, dtype=dtype)
    lengths = (geometry.kernel, positions, x.shape[2:], geometry.stride, geometry.dilation)
    with on_device_of(x):
        _moments[(across, across, shares * groups)](
            x,
            partial,
            rows,
            share,
            shares,
            width,
            channels,
            *(n for length in lengths for n in _three(length, 1)),
            *_three(geometry.before, 0),
            x.stride(0),
            x.stride(1),
            *_three(x.stride()[2:], 0),
            TILE=_TILE,
            DEPTH=_DEPTH,
            TOTAL=TRITON_DTYPES[dtype],
            **arithmetic(x.dtype),
        )
    return partial[0] if shares == 1 else partial.sum(0)


def _three(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    """As if there were three axes: those in front have one place."""
    return (missing,) * (_AXES - len(values)) + tuple(values)
