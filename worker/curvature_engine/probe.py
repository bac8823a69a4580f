"""Which row of a tap belongs to which sample.

Shapes do not say, and a gradient check cannot see it. So ask the program: a random cotangent is sent back to the
taps, then once more with every sample's part scaled by its own power of two. A row that belongs to one sample comes
back scaled by exactly that power (powers of two commute with rounding), in any precision; a row that came back
otherwise mixes samples. As powers are few, a sample's number is sent digit by digit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature_engine.tape import Tap

UNKNOWN = -1  # no gradient reaches this row, whatever the cotangent
MIXED = -2


@dataclass(frozen=True)
class Attribution:
    """Rows [R] of a tap in sample-major order.

    Attributes:
        order: "major" (row n·T + t), "minor" (row t·N + n), or "index".
        index: for "index": [N, T] row numbers, R standing for a row of zeros.
    """

    N: int
    order: str
    R: int
    index: Tensor | None = None

    def arrange(self, rows: Tensor, row_axes: int) -> Tensor:
        """Bring a tensor whose first `row_axes` axes are rows into [N, T, …]."""
        flat = rows.reshape(self.R, *rows.shape[row_axes:])
        if self.order == "major":
            return flat.view(self.N, self.R // self.N, *flat.shape[1:])
        if self.order == "minor":
            return flat.view(self.R // self.N, self.N, *flat.shape[1:]).transpose(0, 1)
        assert self.index is not None
        padded = torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])
        return padded[self.index.to(flat.device)]


@dataclass(frozen=True)
class TapVerdict:
    """What the probe found about one tap. `attribution` is None where rows are not one sample each."""

    attribution: Attribution | None
    pure: bool


@dataclass(frozen=True)
class Verdict:
    """What the probe found about one path through a program."""

    taps: tuple[TapVerdict, ...]
    mismatched: frozenset[str] = frozenset()
    """Parameters whose summed closed form disagrees with ordinary autograd (never expected)."""


def digits_of(N: int, dtype: torch.dtype) -> tuple[int, int]:
    """(levels, digits): how many powers of two are used, and how many sendings tell N samples apart."""
    levels = 8 if dtype == torch.float16 else 16
    digits = 1
    while levels**digits < N:
        digits += 1
    return levels, digits


def scaled_cotangents(u: Tensor) -> list[Tensor]:
    """`u` [N, …] with sample n's part scaled by 2^digit, for each digit of n."""
    levels, digits = digits_of(u.shape[0], u.dtype)
    n = torch.arange(u.shape[0], device=u.device)
    shape = (-1, *[1] * (u.dim() - 1))
    return [u * torch.exp2(((n // levels**d) % levels).to(u.dtype)).view(shape) for d in range(digits)]


def samples_of_elements(base: Tensor, scaled: Sequence[Tensor], N: int, dtype: torch.dtype) -> Tensor:
    """The sample that each element belongs to, `UNKNOWN` where nothing arrives, `MIXED` where several samples meet."""
    levels, _ = digits_of(N, dtype)
    tiny = torch.finfo(base.dtype).tiny * 2**24
    silent = (base.abs() <= tiny) | ~torch.isfinite(base)  # nothing can be read off NaN
    sample = torch.zeros(base.shape, dtype=torch.int64, device=base.device)
    mixed = torch.zeros_like(silent)
    for d, other in enumerate(scaled):
        power = torch.log2((other / base).double())
        digit = power.round()
        # A power that is no whole number, or out of range, is a sum of several samples' parts.
        wrong = ~torch.isfinite(power) | ((power - digit).abs() > 1e-3) | (digit < 0) | (digit >= levels)
        mixed |= torch.where(silent, other.abs() > tiny * 2**levels, wrong)
        sample += digit.nan_to_num(0.0, 0.0, 0.0).clamp(0, levels - 1).long() * levels**d
    mixed |= ~silent & (sample >= N)
    sample = torch.where(silent, UNKNOWN, sample)
    return torch.where(mixed, MIXED, sample)


def attribute(tap: Tap, base: Sequence[Tensor | None], scaled: Sequence[Sequence[Tensor | None]], N: int) -> TapVerdict:
    """Judge one tap from its gradients under the plain and the scaled cotangents (one per output edge)."""
    pure, samples = True, None
    for edge, plain in enumerate(base):
        if plain is None:
            continue
        others = [s[edge] for s in scaled]
        samples = samples_of_elements(plain, [o for o in others if o is not None], N, plain.dtype)
        pure = pure and not bool((samples == MIXED).any())
    if tap.rule is None or samples is None or not pure:
        return TapVerdict(None, pure)
    rows = tap.rule.canonical(samples)
    R = math.prod(rows.shape[: tap.rule.row_axes])
    flat = rows.reshape(R, -1)
    highest = flat.max(1).values if flat.shape[1] else flat.new_full((R,), UNKNOWN)
    agrees = ((flat == highest[:, None]) | (flat == UNKNOWN)).all()
    return TapVerdict(find_order(highest, N) if bool(agrees) else None, pure)


def find_order(rows: Tensor, N: int) -> Attribution | None:
    """The simplest order that explains which sample each row [R] belongs to (rows where nothing arrives fit any)."""
    R = rows.numel()
    known = rows != UNKNOWN
    if R % N == 0 and R > 0:
        counter = torch.arange(R, device=rows.device)
        for order, guess in (("major", counter // (R // N)), ("minor", counter % N)):
            if bool((rows[known] == guess[known]).all()):
                return Attribution(N, order, R)
    if R == 0 or not bool(known.any()):
        return None
    counts = torch.bincount(rows[known], minlength=N)
    index = rows.new_full((N, int(counts.max())), R)
    by_sample = torch.argsort(torch.where(known, rows, N), stable=True)[: int(known.sum())]
    within = torch.arange(len(by_sample), device=rows.device) - (counts.cumsum(0) - counts)[rows[by_sample]]
    index[rows[by_sample], within] = by_sample
    return Attribution(N, "index", R, index)
