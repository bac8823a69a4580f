"""Tensors whose rows a data set's shards keep: their parts one after another along the samples' axis, times one number.

The shards did not know the whole data set's Z, so their numbers come to what one batch would give only here.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

import numpy as np

from curvature_client._downloads import File
from curvature_client._remote import stored_type
from curvature_protocol.results import StoredPart, TensorEntry

BLOCK_BYTES = 32 * 2**20
"""So much of a tensor is held at a time while it is streamed."""

THREADS = 4
"""So many parts are read at a time."""


@dataclass(frozen=True)
class PartedTensor:
    """One tensor in the files of several shards; along axis 0, or along a later one after each row."""

    entry: TensorEntry
    open_part: Callable[[StoredPart], File]

    def read(self) -> np.ndarray:
        """All of it."""
        return self.read_rows(0, self.entry.shape[0])

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to before `last` of the first axis, from the parts that hold them alone."""
        rows = np.empty((max(0, last - first), *self.entry.shape[1:]), stored_type(self.entry))
        pieces = list(self._pieces(first, last))

        def fill(piece: "_Piece") -> None:
            target = rows[piece.place]
            data = self.open_part(piece.part).read(piece.start, piece.end)
            target[...] = np.frombuffer(data, rows.dtype).reshape(target.shape)

        if len(pieces) < 2:
            for piece in pieces:
                fill(piece)
        else:
            with ThreadPoolExecutor(min(THREADS, len(pieces))) as pool:
                for _ in pool.map(fill, pieces):
                    pass
        return self._multiplied(rows)

    def stream(self, sink: Callable[[bytes], object]) -> None:
        """Hand its bytes over, a block of rows at a time, or a row's parts as they come where a row is larger."""
        count = self.entry.shape[0]
        row_bytes = prod(self.entry.shape[1:]) * stored_type(self.entry).itemsize
        if row_bytes > BLOCK_BYTES:
            for row in range(count):
                for piece in self._pieces(row, row + 1):
                    whole = _WholeNumbers(self.entry, lambda numbers: sink(self._multiplied(numbers).tobytes()))
                    self.open_part(piece.part).stream(piece.start, piece.end, whole.take)
            return
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for first in range(0, count, step):
            sink(self.read_rows(first, min(count, first + step)).tobytes())

    @cached_property
    def _starts(self) -> list[int]:
        """Where each part begins along the samples' axis, and where the last ends."""
        return [0, *accumulate(part.shape[self.entry.axis] for part in self.entry.parts)]

    def _pieces(self, first: int, last: int) -> Iterator["_Piece"]:
        """What of which part makes up the rows, in order; nothing empty."""
        axis, starts = self.entry.axis, self._starts
        begin = max(0, bisect_right(starts, first) - 1) if axis == 0 else 0
        for index in range(begin, len(self.entry.parts)):
            part, start = self.entry.parts[index], starts[index]
            if axis == 0 and start >= last:
                return
            low, high = (first - start, last - start) if axis == 0 else (first, last)
            low, high = max(0, low), min(part.shape[0], high)
            row_bytes = prod(part.shape[1:]) * stored_type(self.entry).itemsize
            if high <= low or not row_bytes:
                continue
            place: tuple[slice, ...] = (slice(start + low - first, start + high - first),)
            if axis:
                place = (slice(None),) * axis + (slice(start, starts[index + 1]),)
            yield _Piece(part, part.byte_start + low * row_bytes, part.byte_start + high * row_bytes, place)

    def _multiplied(self, numbers: np.ndarray) -> np.ndarray:
        """In place, and rounded once: the product is taken in float64."""
        if self.entry.multiplier != 1.0:
            np.multiply(numbers, self.entry.multiplier, out=numbers, dtype=np.float64, casting="same_kind")
        return numbers


@dataclass(frozen=True)
class _Piece:
    """Bytes of a part's file, and where in the rows they belong."""

    part: StoredPart
    start: int
    end: int
    place: tuple[slice, ...]


class _WholeNumbers:
    """Hands on what comes in pieces of any length as whole numbers."""

    def __init__(self, entry: TensorEntry, sink: Callable[[np.ndarray], object]) -> None:
        self._type, self._sink = stored_type(entry), sink
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Some more bytes."""
        data = self._rest + data
        whole = len(data) - len(data) % self._type.itemsize
        self._rest = data[whole:]
        self._sink(np.frombuffer(data[:whole], self._type).copy())
