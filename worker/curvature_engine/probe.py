"""Which row of a tap belongs to which sample.

Shapes do not say, and a gradient check cannot see it. So ask the program: a random cotangent is sent back to the
taps, then once more with every sample's part scaled by its own power of two. A row that belongs to one sample comes
back scaled by exactly that power (powers of two commute with rounding), in any precision; a row that came back
otherwise mixes samples. As powers are few, a sample's number is sent digit by digit.

What the probe finds holds for the batch it was asked on. Another batch of the same shapes may have other rows alive, or
other samples coupled (a matrix of neighbours among the inputs, a gate that was shut), so a kept verdict is confirmed
on every batch, by the same sendings compared with what the verdict predicts; unless the operators prove that the rows
are those samples' in every batch (`sample_axes`). Of such a batch it is enough to ask a few samples (`few`).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvature_engine.precision import accumulation_dtype
from curvature_engine.speculation import speculates
from curvature_engine.tape import Tap

UNKNOWN = -1  # no gradient reaches this row, whatever the cotangent
MIXED = -2
UNREADABLE = -3  # one does, but too small or too large for its precision to be read

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_HALF_TOLERANCE = 2.0**-6
_MOST_DERIVED = 4096
_PIECE_ELEMENTS = 2**18

T = TypeVar("T")


@dataclass(frozen=True)
class Attribution:
    """Rows [R] of a tap in sample-major order.

    Attributes:
        order: "major" (row n·T + t), "minor" (row t·N + n), or "index".
        determined: whether rows without gradient can be placed, too.
        index: for "index": [N, T] row numbers, R standing for a row of zeros.
    """

    N: int
    order: str
    R: int
    determined: bool = True
    index: Tensor | None = None

    @property
    def even(self) -> bool:
        """Whether every sample has the same number of rows."""
        return self.index is None or not bool((self.index == self.R).any())

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
    """What the probe found about one tap.

    Attributes:
        attribution: None where rows are not one sample each.
        reached: whether any gradient can arrive, whatever the cotangent.
        complete: whether some did of every sample.
    """

    attribution: Attribution | None
    pure: bool
    reached: bool = True
    complete: bool = True


class Derived(dict[Hashable, Any]):
    """What followed from something, under what else it depends on."""

    def recall(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is under a key, or is made now and kept there."""
        found: T | None = self.get(key)
        if found is None:
            found = make()
            if speculates():
                return found
            if len(self) >= _MOST_DERIVED:
                self.clear()
            self[key] = found
        return found


@dataclass(frozen=True)
class Verdict:
    """What the probe found about one path through a program."""

    taps: tuple[TapVerdict, ...]
    mismatched: frozenset[str] = frozenset()
    """Parameters whose summed closed form disagrees with ordinary autograd (never expected)."""
    silent: frozenset[str] = frozenset()
    """Parameters whose closed form was compared with a gradient of zero, which says nothing."""
    finite: bool = True
    """Whether every gradient of the probe was finite: only then does it prove anything."""
    confirmable: bool = True
    """Whether every operator that the batch enters has rows to confirm; else the next batch is judged anew."""
    strides: tuple[int | None, ...] | None = None
    """Where the operators prove the samples to lie in every tap, if they do: then there is nothing to confirm."""
    probed: int | None = None
    """How many samples it was made of, where these are not all."""
    derived: Derived = field(default_factory=Derived, compare=False, repr=False)
    """What followed from it and from nothing else than is in the key: for batches to come, if the verdict is kept."""


class Verdicts:
    """Kept verdicts by path, the least recently used dropped first."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, Verdict] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def held(self) -> list[Any]:
        """All that is kept, to be held on to: the verdicts, and what followed from each so far."""
        return [kept for verdict in self._kept.values() for kept in (verdict, *verdict.derived.values())]

    def get(self, path: Hashable) -> Verdict | None:
        """The verdict kept for a path."""
        if path in self._kept:
            self._kept.move_to_end(path)
        return self._kept.get(path)

    def keep(self, path: Hashable, verdict: Verdict) -> None:
        """Keep a verdict."""
        if speculates():
            return
        self._kept[path] = verdict
        self._kept.move_to_end(path)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)


@dataclass(frozen=True)
class Code:
    """How samples are told apart: sample n is sent as the digits of n to the base `levels`, each as a power of two."""

    N: int
    levels: int

    @classmethod
    def for_gradients(cls, N: int, gradients: Sequence[Tensor | None]) -> "Code":
        """A code whose powers the narrowest of these gradients can hold."""
        return cls(N, 8 if any(g is not None and g.dtype == torch.float16 for g in gradients) else 64)

    def factors(self, device: torch.device) -> list[Tensor]:
        """Per digit, the samples' powers of two: [N] each."""
        n, unit = torch.arange(self.N, device=device), 1
        factors: list[Tensor] = []
        while unit < self.N or not factors:
            factors.append(torch.exp2(((n // unit) % self.levels).double()))
            unit *= self.levels
        return factors


def scaled(u: Tensor, factors: Tensor) -> Tensor:
    """`u` [N, …] with each sample's part scaled by its factor [N]."""
    return u * factors.to(u.dtype).view(-1, *[1] * (u.dim() - 1))


def digits_of_elements(
    base: Sequence[Tensor | None], others: Sequence[Tensor | None], code: Code
) -> list[Tensor | None]:
    """One digit of the sample that each element of some gradients belongs to, or `UNKNOWN`, `MIXED`, `UNREADABLE`.

    `base` are the gradients under the plain cotangent, `others` those under the cotangent scaled by that digit. Digits
    are bytes, made a piece at a time: of large nets' gradients nothing else of their size is to be held.
    """
    return [
        None if plain is None else _digits(plain, torch.zeros_like(plain) if other is None else other, code)
        for plain, other in zip(base, others, strict=True)
    ]


def _digits(base: Tensor, other: Tensor, code: Code) -> Tensor:
    if base.is_complex():
        parts = _digits(torch.view_as_real(base), torch.view_as_real(other), code)
        return torch.where((parts == MIXED).any(-1), MIXED, parts.max(-1).values)
    floors = _floors(base)
    digits = torch.empty(base.shape, dtype=torch.int8, device=base.device)
    for plain, sent, found in zip(_pieces(base), _pieces(other), _pieces(digits), strict=True):
        found.copy_(_digits_of_piece(plain, sent, code, *floors))
    return digits


def _digits_of_piece(base: Tensor, other: Tensor, code: Code, blurred: float, negligible: float) -> Tensor:
    tolerance = _TOLERANCE.get(base.dtype, _HALF_TOLERANCE)
    # Nothing can be read off NaN, and the result shows it; what is lost in rounding may go to any sample.
    silent = (base.abs() <= negligible) | ~torch.isfinite(base)
    unreadable = ~silent & ((base.abs() < blurred) | ~torch.isfinite(other))
    ratio = other.to(accumulation_dtype(other.dtype)) / base
    digit = torch.log2(ratio).round()
    nominal = torch.exp2(digit)
    # A ratio that is no power of two, or out of range, is a sum of several samples' parts.
    fits = ((ratio - nominal).abs() <= tolerance * nominal) & (digit >= 0) & (digit < code.levels)
    loud = other.abs() > max(negligible, torch.finfo(base.dtype).tiny) * 2.0**code.levels
    mixed = torch.where(silent, torch.isfinite(base) & loud, ~fits)
    digit = digit.nan_to_num(0.0, 0.0, 0.0).clamp(0, code.levels - 1).to(torch.int8)
    digit = torch.where(silent, UNKNOWN, digit)
    digit = torch.where(mixed, MIXED, digit)
    return torch.where(unreadable, UNREADABLE, digit)


def samples_of_elements(digits: Sequence[Tensor], code: Code) -> Tensor:
    """The sample that each element belongs to, from its digits; or `UNKNOWN`, `MIXED`, `UNREADABLE`."""
    samples = torch.zeros(digits[0].shape, dtype=torch.int32, device=digits[0].device)
    for place, found in enumerate(digits):
        samples.add_(found, alpha=code.levels**place)
    samples.masked_fill_(samples >= code.N, MIXED)
    # In a silent element all digits are unknown, unless something is loud.
    for flag in (UNKNOWN, MIXED, UNREADABLE):
        for found in digits:
            samples.masked_fill_(found == flag, flag)
    return samples


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor, none so large that temporary values of its size would matter."""
    if x.numel() <= _PIECE_ELEMENTS or x.device.type != "cpu":
        return (x,)
    axis = max(range(x.dim()), key=lambda a: x.shape[a])
    return torch.split(x, max(1, x.shape[axis] * _PIECE_ELEMENTS // x.numel()), axis)


def _floors(gradient: Tensor) -> tuple[float, float]:
    """(below this, rounding to denormals shows; below this, an element is lost in its neighbours' rounding)."""
    info = torch.finfo(gradient.dtype)
    blurred = info.tiny * (8 if gradient.dtype == torch.float16 else 2.0**24)
    pieces = _pieces(gradient) if gradient.numel() else ()
    largest = max((float(p.abs().nan_to_num(0.0, 0.0, 0.0).max()) for p in pieces), default=0.0)
    return blurred, min(blurred, info.eps**2 * largest)


def attribute(
    tap: Tap, base: Sequence[Tensor | None], digits: Sequence[Sequence[Tensor | None]], code: Code
) -> TapVerdict:
    """Judge one tap from its gradients under the plain cotangent, and their elements' digits (one per output edge)."""
    pure, samples = True, None
    for edge, plain in enumerate(base):
        if plain is None:
            continue
        samples = samples_of_elements([d for found in digits if (d := found[edge]) is not None], code)
        pure = pure and not bool((samples == MIXED).any())
    if samples is None:
        return TapVerdict(None, pure, reached=False)
    if tap.rule is None or not pure:
        return TapVerdict(None, pure)
    rows = _samples_of_rows(tap.rule.canonical(samples), tap.rule.row_axes)
    if rows is None:
        return TapVerdict(None, pure)
    heard = torch.bincount(rows[rows >= 0], minlength=code.N)
    return TapVerdict(find_order(rows, code.N), pure, complete=bool((heard > 0).all()))


def _samples_of_rows(samples: Tensor, row_axes: int) -> Tensor | None:
    """The sample of each row, in the rows' axes; None where a row holds several samples', or cannot be read."""
    axes = samples.shape[:row_axes]
    R = math.prod(axes)
    if not samples.numel():
        return samples.new_full(axes, UNKNOWN, dtype=torch.int64)
    flat = samples.reshape(R, -1)
    highest = flat.max(1).values
    if not bool(((flat == highest[:, None]) | (flat < 0)).all()):
        return None
    unreadable = (highest < 0) & (flat == UNREADABLE).any(1)
    return None if bool(unreadable.any()) else highest.view(axes).long()


def find_order(rows: Tensor, N: int) -> Attribution | None:
    """The simplest order that explains which sample each row (of one or more axes) belongs to.

    Rows where nothing arrives fit any.
    """
    axes, rows = rows.shape, rows.flatten()
    R = rows.numel()
    known = rows != UNKNOWN
    whole = bool(known.all())
    if R % N == 0 and R > 0:
        counter = torch.arange(R, device=rows.device)
        guesses = {"major": counter // (R // N)}
        if 1 < N < R:  # else there is but one regular order
            guesses["minor"] = counter % N
        fitting = [order for order, guess in guesses.items() if bool((rows[known] == guess[known]).all())]
        if fitting:
            single = len(fitting) == 1 and _only_order(rows.view(axes), N) == fitting[0]
            determined = whole or R == N or single
            return Attribution(N, fitting[0], R, determined=determined)
    if R == 0 or not bool(known.any()):
        return None
    counts = torch.bincount(rows[known], minlength=N)
    index = rows.new_full((N, int(counts.max())), R)
    by_sample = torch.argsort(torch.where(known, rows, N), stable=True)[: int(known.sum())]
    within = torch.arange(len(by_sample), device=rows.device) - (counts.cumsum(0) - counts)[rows[by_sample]]
    index[rows[by_sample], within] = by_sample
    return Attribution(N, "index", R, determined=whole, index=index)


def _only_order(rows: Tensor, N: int) -> str | None:
    """The one regular order that could explain rows of which some are silent, if there is one.

    Rows of another order, some of them dead, may happen to pass for a regular one. So an order must be the only one to
    fit (the samples may be rearranged), among those whose axis has the samples' number, and those in which a position
    is silent for all samples or for none.
    """
    T = rows.numel() // N
    named = {0: "major", rows.dim() - 1: "minor"} if rows.dim() > 1 else {}
    tables = {named.get(a, f"axis {a}"): rows.movedim(a, 0).reshape(N, T) for a, n in enumerate(rows.shape) if n == N}
    aligned = set(tables)
    tables = {"major": rows.reshape(N, T), "minor": rows.reshape(T, N).T} | tables
    fitting = {name for name, table in tables.items() if _is_one_sample_each(table)}
    regular = {name for name in fitting if _is_silent_by_position(tables[name])}
    if len(regular | (fitting & aligned)) != 1 or (not regular and len(fitting) > 1):
        return None
    return next(iter(regular | (fitting & aligned)))


def _is_silent_by_position(table: Tensor) -> bool:
    alive = table != UNKNOWN
    return torch.equal(alive, alive[:1].expand_as(alive))


def _is_one_sample_each(table: Tensor) -> bool:
    """Whether every line of [N, T] may be another sample's, as far as rows are known; one line may be silent."""
    samples = [line[line != UNKNOWN].unique().tolist() for line in table]
    if any(len(found) > 1 for found in samples) or sum(not found for found in samples) > 1:
        return False
    known = [found[0] for found in samples if found]
    return len(set(known)) == len(known)


def predicts(
    tap: Tap, attribution: Attribution, base: Tensor, other: Tensor, factors: Tensor, *, all_listed: bool = True
) -> bool:
    """Whether `other`, the gradient under the scaled cotangent, is `base` scaled as the attribution says.

    `all_listed`: whether rows that are in no sample's list speak against it, as they may have come alive; else they do
    only if they have.
    """
    rule = tap.rule
    assert rule is not None
    plain = attribution.arrange(rule.canonical(base), rule.row_axes)
    found = attribution.arrange(rule.canonical(other), rule.row_axes)
    expected = scaled(plain, factors)
    if attribution.index is not None and not attribution.determined:
        unlisted = torch.ones(attribution.R + 1, dtype=torch.bool, device=base.device)
        unlisted[attribution.index.flatten()] = False
        rows = rule.canonical(base).reshape(attribution.R, -1)
        if all_listed or bool(rows[unlisted[:-1]].any()):
            return False
    if torch.equal(expected, found):
        return True
    tolerance, (_, negligible) = _TOLERANCE.get(base.dtype, _HALF_TOLERANCE), _floors(base)
    allowed = scaled(tolerance * plain.abs() + negligible, factors)
    return bool(((found - expected).abs() <= allowed).all())
