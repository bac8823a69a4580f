"""Where results lie while they are made: in memory, or in files where they exceed the budget.

A *slab* is one result tensor of known shape, filled a few rows at a time. Slabs in files are written through plain
file writes, since pages of a shared mapping count as the process's memory until they reach the disk, and are handed
back as tensors that read the file when their numbers are used. A group's tensors share one file in the layout of
safetensors: eight bytes that hold the header's length, a JSON header, the tensors one after another. Shapes are known
before the numbers, so the header comes first.
"""

import ctypes
import json
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.errors import EngineError, first_line

NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
"""Number formats by their names in safetensors files."""
_ALIGNMENT = 8
SUFFIX = ".safetensors"

Change = Callable[[Tensor], Any]


class Slab(ABC):
    """One result [*leading, *rest], as rows [Π leading, *rest]; zero before anything is written.

    Rows are named by their numbers, each once per call.
    """

    @abstractmethod
    def write(self, rows: Sequence[int], block: Tensor) -> None:
        """Put `block` [n, *rest] where the rows lie."""

    @abstractmethod
    def update(self, rows: Sequence[int], change: Change) -> None:
        """Let `change` edit the rows [n, *rest] in place."""

    def place(self, rows: Sequence[int]) -> Tensor | None:
        """Where the rows lie, [n, *rest], if they lie together in memory: for one who overwrites them all."""
        return None

    @abstractmethod
    def result(self) -> Tensor:
        """The whole tensor."""


class MemorySlab(Slab):
    """A tensor on the device."""

    def __init__(self, shape: Sequence[int], leading: int, dtype: torch.dtype, device: torch.device) -> None:
        self._whole, clear = pages.vacant(shape, dtype, device)
        self._rows = self._whole.view(prod(shape[:leading]), *shape[leading:])
        self._stale = bytearray() if clear else bytearray(b"\1") * len(self._rows)
        """Which rows hold what somebody else left there; empty if none ever did."""

    def write(self, rows: Sequence[int], block: Tensor) -> None:
        self._rows[_indices(rows)] = block
        self._freshen(rows)

    def place(self, rows: Sequence[int]) -> Tensor | None:
        indices = _indices(rows)
        if not isinstance(indices, slice):
            return None
        self._freshen(rows)
        return self._rows[indices]

    def update(self, rows: Sequence[int], change: Change) -> None:
        self._clear(rows)
        indices = _indices(rows)
        found = self._rows[indices]
        change(found)
        if not isinstance(indices, slice):
            self._rows[indices] = found

    def result(self) -> Tensor:
        self._clear(range(len(self._rows)))
        return self._whole

    def _freshen(self, rows: Sequence[int]) -> None:
        """Note that rows are overwritten."""
        if self._stale:
            for row in rows:
                self._stale[row] = 0

    def _clear(self, rows: Sequence[int]) -> None:
        """Make zero what nobody has written."""
        stale = [row for row in rows if self._stale[row]] if self._stale else []
        for number, part in _runs(stale):
            self._rows[number : number + part.stop - part.start].zero_()
        self._freshen(stale)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file, in bytes from its beginning."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return prod(self.shape) * self.dtype.itemsize


class TensorFile(MutableMapping[str, Tensor]):
    """Tensors in a safetensors file, mapped when they are first asked for; none comes or goes."""

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        self.path, self.places = path, dict(places)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        offset = place.start // place.dtype.itemsize
        empty = torch.empty(0, dtype=place.dtype)
        strides = torch.empty(place.shape, device="meta").stride()
        return empty.set_(self._storage, offset, place.shape, strides)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        raise TypeError("the tensors of a file are given")

    def __delitem__(self, name: str) -> None:
        raise TypeError("the tensors of a file are given")

    def open(self) -> None:
        """Map the file now."""
        assert self._storage is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def _storage(self) -> torch.UntypedStorage:
        # Private: an edit of a result never reaches the file.
        storage = torch.UntypedStorage.from_file(str(self.path), False, self.path.stat().st_size)
        assert isinstance(storage, torch.UntypedStorage)
        return storage


class FileSlab(Slab):
    """Rows of a tensor in a file that is open for reading and writing."""

    def __init__(self, descriptor: int, place: Place, leading: int) -> None:
        self._descriptor, self._place = descriptor, place
        self._rest = place.shape[leading:]
        self._row_bytes = prod(self._rest) * place.dtype.itemsize

    def write(self, rows: Sequence[int], block: Tensor) -> None:
        block = block.detach().to("cpu", self._place.dtype).contiguous()
        for number, part in _runs(rows):
            _write(self._descriptor, block[part], self._offset(number))

    def update(self, rows: Sequence[int], change: Change) -> None:
        found = torch.empty(len(rows), *self._rest, dtype=self._place.dtype)
        for number, part in _runs(rows):
            _read(self._descriptor, found[part], self._offset(number))
        change(found)
        self.write(rows, found)

    def result(self) -> Tensor:
        raise AssertionError("a slab in a file is read through its file")

    def _offset(self, row: int) -> int:
        return self._place.start + row * self._row_bytes


Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensors of one group by name: shape and number format."""


class ResultStore:
    """Hands out slabs: those of the groups in `layouts` in files of `folder`, others in memory."""

    def __init__(self, folder: Path | None = None, layouts: Mapping[str, Layout] | None = None) -> None:
        self._descriptors: dict[str, int] = {}
        self.files: dict[str, TensorFile] = {}
        for label, layout in (layouts or {}).items():
            assert folder is not None
            path = folder / f"{label}{SUFFIX}"
            header, places = lay_out(layout)
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptors[label] = descriptor = os.open(path, flags, 0o600)
            self.files[label] = TensorFile(path, places)
            os.ftruncate(descriptor, max((p.start + p.nbytes for p in places.values()), default=len(header)))
            os.pwrite(descriptor, header, 0)

    def slab(
        self, label: str, name: str, shape: Sequence[int], leading: int, dtype: torch.dtype, device: torch.device
    ) -> Slab:
        """A slab of zeros for one tensor of a group."""
        if label not in self.files:
            return MemorySlab(shape, leading, dtype, device)
        place = self.files[label].places[name]
        assert place.shape == tuple(shape)
        assert place.dtype == dtype
        return FileSlab(self._descriptors[label], place, leading)

    def close(self) -> None:
        """Nothing is written any more; files can still be read."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def hide(self) -> None:
        """Close, and take the files' names away: their room is freed with the last tensor that reads them."""
        self.close()
        for file in self.files.values():
            file.open()
            file.path.unlink()

    def discard(self) -> None:
        """Close, and remove the files: what they hold is not whole."""
        self.close()
        for file in self.files.values():
            file.path.unlink(missing_ok=True)


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a safetensors file that `save_tensors` or `ResultStore` wrote: none is read before it is used.

    Raises:
        EngineError: `internal_error` for a file that is not one.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is cut off")
            claims = json.loads(file.read(length))
        claims.pop("__metadata__", None)
        places = {name: _claimed(claim, 8 + length) for name, claim in claims.items()}
        if max((p.start + p.nbytes for p in places.values()), default=0) > path.stat().st_size:
            raise ValueError("it ends too early")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise EngineError(
            "internal_error",
            f"{path.name} does not hold a part's tensors: {first_line(error)}",
            remedy="compute the part anew",
        ) from error
    return TensorFile(path, places)


def _claimed(claim: Mapping[str, Any], start: int) -> Place:
    """Where the header says a tensor lies."""
    first, stop = claim["data_offsets"]
    place = Place(tuple(int(n) for n in claim["shape"]), DTYPES[claim["dtype"]], start + int(first))
    if place.nbytes != stop - first or first < 0 or place.start % place.dtype.itemsize or min((0, *place.shape)) < 0:
        raise ValueError(f"a tensor of shape {list(place.shape)} cannot lie at {first}")
    return place


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, one tensor after another: of at most one there is a copy in memory."""
    layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    store = ResultStore(path.parent, {path.name.removesuffix(SUFFIX): layout})
    try:
        for name, tensor in tensors.items():
            slab = store.slab(path.name.removesuffix(SUFFIX), name, tensor.shape, 0, tensor.dtype, tensor.device)
            slab.write((0,), tensor.unsqueeze(0))
    finally:
        store.close()


def lay_out(layout: Layout) -> tuple[bytes, dict[str, Place]]:
    """(header, places) of a safetensors file; wider formats first, so that every tensor is aligned."""
    names = sorted(layout, key=lambda name: (-layout[name][1].itemsize, name))
    claims: dict[str, Any] = {}
    at = 0
    for name in names:
        shape, dtype = layout[name]
        nbytes = prod(shape) * dtype.itemsize
        claims[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(claims, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    header = struct.pack("<Q", len(text)) + text
    return header, {
        name: Place(tuple(layout[name][0]), layout[name][1], start + claims[name]["data_offsets"][0]) for name in layout
    }


def _indices(rows: Sequence[int]) -> slice | list[int]:
    """Consecutive rows as a slice, which makes a view."""
    runs = list(_runs(rows))
    if len(runs) == 1:
        return slice(runs[0][0], runs[0][0] + len(rows))
    return list(rows)


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(first row, which of `rows`) of every run of consecutive numbers."""
    begun = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[begun], slice(begun, i)
            begun = i


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own bytes."""
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _write(descriptor: int, block: Tensor, offset: int) -> None:
    data = bytes_of(block) if block.nbytes else memoryview(b"")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _read(descriptor: int, block: Tensor, offset: int) -> None:
    data = bytes_of(block) if block.nbytes else memoryview(b"")
    while data:
        found = os.preadv(descriptor, [data], offset)
        if not found:
            raise OSError("a result's file ended too early")
        data, offset = data[found:], offset + found
