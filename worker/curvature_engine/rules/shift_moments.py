"""Second moments of a convolution's patches by shifts between kernel places, for stride and dilation one.

With x padded, the block of kernel places i and i + d along one axis is Σ_p x[p + i] x[p + i + d]ᵀ = Σ_q x[q] x[q + d]ᵀ
over q = i … i + P − 1: of i, only the ends of the range depend. So the products of a shift are summed once over the q
that all i see, q = k − 1 − d … P − 1, and those at the ends are added where they belong; d < 0 is the transpose. That
takes k products in place of k² (derived here; the factor is that of Grosse & Martens 2016, section 3.2). Nothing is
subtracted, so nothing cancels.

One axis, the main one, is taken so. What x[q] is: the patches along the other axes, in full (`rest` places × channels).
Of two axes, the sums over the inner q of both may instead come from a convolution's weight gradient, which is just
that, Σ_q x[q] x[q + (e, d)]ᵀ for all shifts at once, without any patches; columns at the ends stay as they are, and
rows at the ends are added as above.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from curvature_engine import pages
from curvature_engine.rules.gram import add_product

_BLOCK_BYTES = 8 * 2**20
_WHOLE_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Shifts:
    """Sizes of one sum of products by shifts.

    Attributes:
        main: the axis whose shifts are used.
        whole: whether the sums over inner places of both axes come from a weight gradient.
    """

    kernel: tuple[int, ...]
    before: tuple[int, ...]
    space: tuple[int, ...]
    positions: tuple[int, ...]
    channels: int
    groups: int
    main: int
    whole: bool

    @cached_property
    def rest(self) -> tuple[int, ...]:
        """The other axes."""
        return tuple(a for a in range(len(self.kernel)) if a != self.main)

    @property
    def k(self) -> int:
        """Kernel places along the main axis."""
        return self.kernel[self.main]

    @property
    def P(self) -> int:
        """Positions along the main axis."""
        return self.positions[self.main]

    @property
    def width(self) -> int:
        """Of what stands at one place of the main axis, in one group."""
        return prod(self.kernel[a] for a in self.rest) * self.channels // self.groups

    @property
    def lines(self) -> int:
        """Positions along the other axes."""
        return prod(self.positions[a] for a in self.rest)

    def inner(self, d: int) -> tuple[int, int]:
        """Places q … q′ − 1 that every kernel place sees at shift d, as far as they are not left to `whole`."""
        return self._within(self.k - 1 - d, self.k - 1 if self.whole else self.P, d)

    def ends(self, d: int) -> Iterator[int]:
        """Places q with x[q] and x[q + d] not all zero, that only some kernel places see at shift d."""
        yield from range(*self._within(0, self.k - 1 - d, d))
        yield from range(*self._within(self.P, self.P + self.k - 1 - d, d))

    def _within(self, first: int, stop: int, d: int) -> tuple[int, int]:
        low, high = self.before[self.main], self.before[self.main] + self.space[self.main] - d
        first = max(first, low)
        return first, max(first, min(stop, high))

    def rows_at_ends(self) -> Iterator[tuple[int, int, int]]:
        """Places q of the other axis that only some of its kernel places see, with the shifts that do not meet zeros.

        Yields:
            q, the least and the greatest shift.
        """
        (axis,) = self.rest
        k, P, low, high = self.kernel[axis], self.positions[axis], self.before[axis], self.space[axis]
        for q in (*range(k - 1), *range(P, P + k - 1)):
            if low <= q < low + high:
                yield q, max(1 - k, low - q), min(k - 1, low + high - 1 - q)

    @property
    def multiply_adds(self) -> int:
        """Of one sample."""
        pairs = sum(
            max(0, stop - first) + len(list(self.ends(d))) for d in range(self.k) for first, stop in [self.inner(d)]
        )
        found = pairs * self.lines * self.groups * self.width**2
        if not self.whole:
            return found
        (axis,) = self.rest
        products = (self.P - self.k + 1) * self.k * self.channels**2 // self.groups
        shifts = (self.positions[axis] - self.kernel[axis] + 1) * (2 * self.kernel[axis] - 1)
        return found + products * (shifts + sum(high - low + 1 for _, low, high in self.rows_at_ends()))

    @property
    def calls(self) -> int:
        """How many products there are, of one block of samples; a weight gradient copies both its factors, too."""
        ends = sum(len(list(self.ends(d))) for d in range(self.k))
        return self.k + ends + (3 * (1 + len(list(self.rows_at_ends()))) if self.whole else 0)

    @property
    def written(self) -> int:
        """Numbers of all products, until they are put together."""
        ends = sum(len(list(self.ends(d))) for d in range(self.k))
        found = (self.k + ends) * self.groups * self.width**2
        if self.whole:
            (axis,) = self.rest
            size = (2 * self.kernel[axis] - 1) * self.k * self.channels**2 // self.groups
            found += (1 + self.kernel[axis] + len(list(self.rows_at_ends()))) * size
        return found

    @property
    def per_sample(self) -> int:
        """Numbers rearranged for one sample."""
        S = self.P + self.k - 1
        padded = self.channels * prod(p + k - 1 for p, k in zip(self.positions, self.kernel, strict=True))
        columns = min(S, 3 * (self.k - 1)) if self.whole else S
        return padded * (3 if self.whole else 1) + columns * self.lines * self.groups * self.width

    def block(self, itemsize: int, budget_bytes: int) -> int:
        """How many samples are rearranged at a time."""
        most = _WHOLE_BLOCK_BYTES if self.whole else _BLOCK_BYTES
        room = min(most, max(0, budget_bytes - self.written * itemsize))
        return max(1, room // max(1, self.per_sample * itemsize))


def shift_moment(x: Tensor, shifts: Shifts, budget_bytes: int) -> Tensor:
    """Σ over samples and positions of patches' products, x [u, c, *space] → [groups, *k, c/groups, *k, c/groups]."""
    sums = _Sums(shifts, x)
    size = shifts.block(x.element_size(), budget_bytes)
    for first in range(0, len(x), size):
        sums.add(_padded(x[first : first + size], shifts))
    return sums.finish()


def _padded(x: Tensor, shifts: Shifts) -> Tensor:
    """[u, c, *space] → [S of the main axis, u, *S of the others, c]."""
    order = (shifts.main, *shifts.rest)
    size = [shifts.positions[a] + shifts.kernel[a] - 1 for a in order]
    result = x.new_zeros(size[0], len(x), *size[1:], x.shape[1])
    start = [shifts.before[a] for a in order]
    stop = [s + shifts.space[a] for s, a in zip(start, order, strict=True)]
    windows = [slice(s, e) for s, e in zip(start, stop, strict=True)]
    result[(windows[0], slice(None), *windows[1:])] = x.permute(shifts.main + 2, 0, *(a + 2 for a in shifts.rest), 1)
    return result


class _Sums:
    """Products by shifts, summed over blocks of samples."""

    def __init__(self, shifts: Shifts, like: Tensor) -> None:
        self._shifts = shifts
        width = shifts.width
        self._inner = pages.zeros((shifts.k, shifts.groups, width, width), like)
        self._ends: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[int, Tensor] = {}
        self._both: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add samples [S, u, *S, c]."""
        shifts = self._shifts
        k, P = shifts.k, shifts.P
        if shifts.whole:
            self._add_whole(x)
            self._add_columns(self._lines(x[: 2 * k - 2]), 0, 0, k - 1)
            self._add_columns(self._lines(x[P:]), P, P, P + k - 1)
        else:
            self._add_columns(self._lines(x), 0, 0, P + k - 1)

    def _lines(self, x: Tensor) -> Tensor:
        """Patches along the other axes, [q, u, *S, c] → [groups, q, u·lines, width] with the channels last in it."""
        shifts = self._shifts
        q, u = x.shape[:2]
        groups, channels = shifts.groups, shifts.channels // shifts.groups
        step = x.stride()
        windows = x.as_strided(
            (
                groups,
                q,
                u,
                *(shifts.positions[a] for a in shifts.rest),
                *(shifts.kernel[a] for a in shifts.rest),
                channels,
            ),
            (channels * step[-1], *step[:2], *step[2:-1], *step[2:-1], step[-1]),
            x.storage_offset(),
        )
        return windows.reshape(groups, q, u * shifts.lines, shifts.width)

    def _add_columns(self, lines: Tensor, offset: int, first: int, stop: int) -> None:
        """Add the products of those places of first … stop − 1 that count by themselves; `lines` begins at `offset`."""
        for d in range(self._shifts.k):
            low, high = self._shifts.inner(d)
            if first <= low < high <= stop:
                here, there = (lines[:, q - offset : q - offset + high - low].flatten(1, 2) for q in (low, low + d))
                add_product(here, there, self._inner[d])
            for q in self._shifts.ends(d):
                if first <= q < stop:
                    here, there = lines[:, q - offset], lines[:, q - offset + d]
                    self._ends[d, q] = add_product(here, there, self._ends.get((d, q)))

    def _add_whole(self, x: Tensor) -> None:
        """Add what the inner columns make: one weight gradient for the inner rows, one for each at the ends."""
        shifts = self._shifts
        (axis,) = shifts.rest
        k, P = shifts.kernel[axis], shifts.positions[axis]
        image = x.permute(1, 3, 2, 0)  # [u, c, S of the other axis, S]
        right = image[..., shifts.k - 1 :]
        left = right[..., : shifts.P - shifts.k + 1]
        self._both = _plus(self._both, self._weight_gradient(left[:, :, k - 1 : P], right))
        for q, low, high in shifts.rows_at_ends():
            found = self._weight_gradient(left[:, :, q : q + 1], right[:, :, q + low : q + high + 1])
            self._rows[q] = _plus(self._rows.get(q), found)

    def _weight_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ l[q] r[q + shift]ᵀ, [c, c/groups, *shifts]."""
        shifts = [high - low + 1 for low, high in zip(left.shape[2:], right.shape[2:], strict=True)]
        groups = self._shifts.groups
        size = [left.shape[1], left.shape[1] // groups, *shifts]
        left, right = (t.contiguous(memory_format=torch.channels_last) for t in (left, right))
        found: Tensor = conv2d_weight(right, size, left, groups=groups)  # type: ignore[no-untyped-call]
        return found

    def finish(self) -> Tensor:
        """Put the blocks together."""
        shifts = self._shifts
        if shifts.whole:
            self._spread_rows()
        channels = shifts.channels // shifts.groups
        axes, sizes = len(shifts.kernel), (*shifts.kernel, channels)
        result = pages.blank((shifts.groups, *sizes, *sizes), self._inner)
        rest = (*(shifts.kernel[a] for a in shifts.rest), channels)
        for d in range(shifts.k):
            for i, block in enumerate(self._blocks(d)):
                places = result.select(shifts.main + 1, i).select(shifts.main + 1 + axes, i + d)
                places.copy_(block.view(shifts.groups, *rest, *rest))
                if d:
                    mirrored = result.select(shifts.main + 1, i + d).select(shifts.main + 1 + axes, i)
                    mirrored.copy_(block.mT.reshape(shifts.groups, *rest, *rest))
        return result

    def _blocks(self, d: int) -> Sequence[Tensor]:
        """Those of kernel places i and i + d, by i: [groups, width, width]."""
        last = self._shifts.k - 1 - d
        blocks = [self._inner[d]] * (last + 1)
        for i in reversed(range(last)):
            blocks[i] = _sum(blocks[i + 1], self._ends.get((d, i)))
        right: Tensor | None = None
        for i in range(1, last + 1):
            found = self._ends.get((d, self._shifts.P + i - 1))
            right = found if right is None else _sum(right, found)
            blocks[i] = _sum(blocks[i], right)
        return blocks

    def _spread_rows(self) -> None:
        """Add the inner columns' sums to the shifts' blocks, row pair by row pair."""
        shifts = self._shifts
        (axis,) = shifts.rest
        k, P, groups = shifts.kernel[axis], shifts.positions[axis], shifts.groups
        channels = shifts.channels // groups
        inner = self._inner.view(shifts.k, groups, k, channels, k, channels)
        assert self._both is not None
        shared = {q: (found, low) for q, low, _ in shifts.rows_at_ends() if (found := self._rows.get(q)) is not None}
        for i in range(k):
            total = self._both.clone()
            for q, (found, low) in shared.items():
                if i <= q < i + P:
                    total[:, :, low + k - 1 : low + k - 1 + found.shape[2]] += found
            total = total[:, :, k - 1 - i : 2 * k - 1 - i].reshape(groups, channels, channels, k, shifts.k)
            inner[:, :, i] += total.permute(4, 0, 1, 3, 2)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _sum(left: Tensor, right: Tensor | None) -> Tensor:
    return left if right is None else left + right
