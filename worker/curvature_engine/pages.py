"""Memory of large results, kept from one analysis to the next.

A fresh mapping costs more than the numbers written into it: the kernel clears every page when it is first touched. So
what a result lay in, once nobody holds the result any more, is kept for the next one of about its size. What waits is
marked as free for the taking (`MADV_FREE`): the kernel takes its pages back when memory runs short, also that of the
process's control group, and else they are there without a fault. It is bounded all the same, since limits on addresses
count it; and whoever lacks memory drops it first, so that nothing ever fails for what is kept here.
"""

import mmap
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from curvature_engine.errors import EngineError, lacks_memory

LEAST_BYTES = 2**22
"""Smaller results come from the allocator."""
_HUGE_PAGE = 2**21
_EXCESS = 4
"""A mapping serves a result that leaves at most one part in so many of it unused."""

T = TypeVar("T")


class Pages:
    """Mappings that wait for their next use.

    They come back from finalizers, which may run in any thread and within any statement. So there is no lock, only
    single operations on one list, each of which the interpreter makes whole.
    """

    def __init__(self) -> None:
        self.limit_bytes = 0
        """Of what waits; an analysis sets it from its budget."""
        self._idle: list[mmap.mmap] = []

    @property
    def idle_bytes(self) -> int:
        """How much waits."""
        return sum(len(pages) for pages in list(self._idle))

    def take(self, nbytes: int) -> tuple[memoryview, bool]:
        """Memory of `nbytes` > 0, and whether it is clear: else anything may stand in it.

        It comes back when nothing refers to the view any more, nor to what was made of it.

        Raises:
            MemoryError: if there is none.
        """
        size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
        found = self._fitting(size)
        pages = self._mapped(size) if found is None else found
        view = memoryview(pages)[:nbytes]
        weakref.finalize(view, self._give_back, pages).atexit = False
        return view, found is None

    def drop(self, keep_bytes: int = 0) -> int:
        """Let go of what waits longest, until no more than `keep_bytes` wait. Returns how many bytes went."""
        dropped, excess = 0, self.idle_bytes - keep_bytes
        while dropped < excess:
            try:
                dropped += len(self._idle.pop(0))
            except IndexError:  # another thread was here
                break
        return dropped

    def allow(self, limit_bytes: int) -> None:
        """Set how much may wait."""
        self.limit_bytes = limit_bytes
        self.drop(limit_bytes)

    def _fitting(self, size: int) -> mmap.mmap | None:
        """The smallest that waits and fits, taken out."""
        for pages in sorted(self._idle, key=len):
            if size <= len(pages) <= size + size // _EXCESS:
                with suppress(ValueError):  # another thread took it
                    self._idle.remove(pages)
                    return pages
        return None

    def _mapped(self, size: int) -> mmap.mmap:
        # Something that waits goes for what is new, so that both together never grow.
        self.drop(max(0, self.idle_bytes - size))
        try:
            return _map(size)
        except OSError:
            self.drop()
        try:
            return _map(size)
        except OSError as error:
            raise MemoryError(f"no memory for {size} bytes") from error

    def _give_back(self, pages: mmap.mmap) -> None:
        if self.idle_bytes + len(pages) > self.limit_bytes or not hasattr(mmap, "MADV_FREE"):
            return
        with suppress(OSError):  # else it goes back to the system
            pages.madvise(mmap.MADV_FREE)
            self._idle.append(pages)


PAGES = Pages()
"""The process's."""


def room(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> tuple[Tensor, bool]:
    """A large tensor in main memory, and whether it is zero; else anything may stand in it.

    Raises:
        MemoryError: if there is no memory.
    """
    if _TOLD.made is not None:
        return _TOLD.made(lambda: _flat(dtype, nbytes)[0]).view(shape), False  # another time it may not be clear
    flat, clear = _flat(dtype, nbytes)
    return flat.view(shape), clear


def _flat(dtype: torch.dtype, nbytes: int) -> tuple[Tensor, bool]:
    view, clear = PAGES.take(nbytes)
    return torch.frombuffer(view, dtype=dtype), clear


class _Told(threading.local):
    """Who is told of each of this thread's tensors that lie in what waits: it calls the function given."""

    made: Callable[[Callable[[], Tensor]], Tensor] | None = None


_TOLD = _Told()


@contextmanager
def told_to(made: Callable[[Callable[[], Tensor]], Tensor]) -> Iterator[None]:
    """Have `made` called with a function that makes it wherever this thread takes a tensor from here."""
    before, _TOLD.made = _TOLD.made, made
    try:
        yield
    finally:
        _TOLD.made = before


def vacant(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, bool]:
    """A tensor to be filled, and whether it is zero; a large one in main memory lies in what waits.

    Raises:
        MemoryError: if there is no memory.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LEAST_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device), False
    return room(tuple(shape), dtype, nbytes)


def blank(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of another's dtype and device, in which anything may stand; a large one lies in what waits."""
    return vacant(shape, like.dtype, like.device)[0]


def zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """As `blank`, and zero."""
    found, clear = vacant(shape, like.dtype, like.device)
    return found if clear else found.zero_()


def zeros_like(like: Tensor) -> Tensor:
    """`zeros` of another's shape, which lie in its order; large ones do if they are matrices."""
    if not like.is_cpu or like.nbytes < LEAST_BYTES:
        return torch.zeros_like(like)
    by_columns = like.dim() == 2 and like.stride(0) == 1 < like.shape[0]
    return zeros(like.mT.shape, like).mT if by_columns else zeros(like.shape, like)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy in a `blank` tensor."""
    return blank(tensor.shape, tensor).copy_(tensor)


def with_room(make: Callable[[], T]) -> T:
    """What `make` returns; where it lacks memory, once more after all that waits was dropped."""
    try:
        return make()
    except (EngineError, RuntimeError, MemoryError) as error:
        if not lacks_memory(error) or not drop():
            raise
    return make()


RESERVES: list[Callable[[], int]] = []
"""Others that hold memory for later, and let go of it when they are called; each says of how much."""


def drop() -> int:
    """Let go of all memory that waits, here or with others; 0 where there was none."""
    return PAGES.drop() + sum(reserve() for reserve in RESERVES)


def _map(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages
