"""Stored tensors where they lie: described by the manifest, read by HTTP ranges when somebody looks at the numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from curvature_client._downloads import File
from curvature_client._errors import CurvatureError
from curvature_protocol.results import TensorEntry

# safetensors' name of a type → NumPy's; torch spells these the same. Results are at least float32.
_NUMPY_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "BOOL": "bool"}


class Remote(Protocol):
    """A tensor on the server."""

    @property
    def entry(self) -> TensorEntry:
        """What the manifest says of it."""
        ...

    def read(self) -> np.ndarray:
        """All of it."""
        ...

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to before `last` of the first axis."""
        ...

    def stream(self, sink: Callable[[bytes], object]) -> None:
        """Hand its bytes over, in its own order and type, piece by piece."""
        ...


@dataclass(frozen=True)
class RemoteTensor:
    """One tensor inside a stored file."""

    entry: TensorEntry
    source: File

    def read(self) -> np.ndarray:
        """All of it."""
        return self._array(self.entry.byte_start, self.entry.byte_end, self.entry.shape)

    def read_rows(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to before `last` of the first axis."""
        inner = self.entry.shape[1:]
        row_bytes = prod(inner) * stored_type(self.entry).itemsize
        start = self.entry.byte_start + first * row_bytes
        return self._array(start, start + (last - first) * row_bytes, (last - first, *inner))

    def stream(self, sink: Callable[[bytes], object]) -> None:
        """Hand its bytes over."""
        if self.entry.byte_end > self.entry.byte_start:
            self.source.stream(self.entry.byte_start, self.entry.byte_end, sink)

    def _array(self, start: int, end: int, shape: tuple[int, ...]) -> np.ndarray:
        if end == start:
            return np.zeros(shape, stored_type(self.entry))
        return np.frombuffer(self.source.read(start, end), stored_type(self.entry)).reshape(shape)


def type_name(entry: TensorEntry) -> str:
    """A tensor's type as NumPy and torch spell it.

    Raises:
        CurvatureError: if this client does not know the type.
    """
    name = _NUMPY_NAMES.get(entry.dtype)
    if name is None:
        raise CurvatureError(
            f"{entry.name} has the type {entry.dtype}, which this client does not know",
            code="unsupported_dtype",
            remedy="update the package curvature, or read the file with safetensors",
        )
    return name


def stored_type(entry: TensorEntry) -> np.dtype:
    """NumPy's type of the bytes in the file; errors as `type_name`."""
    return np.dtype(type_name(entry)).newbyteorder("<")


def stored_bytes(entry: TensorEntry) -> int:
    """A tensor's size."""
    return sum(piece.byte_end - piece.byte_start for piece in entry.parts or (entry,))


def read_index(tensor: Remote, index: Any) -> np.ndarray | None:
    """`tensor[index]` by reading only the rows it needs; None where that takes the whole."""
    first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
    shape = tensor.entry.shape
    if not shape or any(not _is_plain(part) for part in rest):
        return None
    length = shape[0]
    if _is_integer(first):
        row = int(first) + length if int(first) < 0 else int(first)
        if not 0 <= row < length:
            raise IndexError(f"index {int(first)} is out of bounds for axis 0 with size {length}")
        return np.asarray(tensor.read_rows(row, row + 1)[(0, *rest)])
    if not isinstance(first, slice):
        return None
    start, stop, step = first.indices(length)
    if step < 1:
        return None
    return np.asarray(tensor.read_rows(start, max(start, stop))[(slice(None, None, step), *rest)])


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_plain(part: Any) -> bool:
    """Whether NumPy and torch mean the same by this part of an index."""
    return part is Ellipsis or _is_integer(part) or (isinstance(part, slice) and (part.step is None or part.step > 0))


class LazyArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A stored tensor as NumPy sees it, read at its first use; for Pythons without torch."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._array: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes; reads nothing."""
        return self._remote.entry.shape

    @property
    def ndim(self) -> int:
        """The number of axes; reads nothing."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements; reads nothing."""
        return prod(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """Its type; reads nothing."""
        return np.dtype(type_name(self._remote.entry))

    @property
    def nbytes(self) -> int:
        """Its size; reads nothing."""
        return stored_bytes(self._remote.entry)

    def fetch(self) -> np.ndarray:
        """The array itself."""
        if self._array is None:
            self._array = self._remote.read()
        return self._array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.fetch(), dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: Callable[..., Any], method: str, *inputs: Any, **options: Any) -> Any:
        plain = [value.fetch() if isinstance(value, LazyArray) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.fetch(), name)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.fetch())

    def __float__(self) -> float:
        return float(self.fetch())

    def __int__(self) -> int:
        return int(self.fetch())

    def __bool__(self) -> bool:
        return bool(self.fetch())

    def __getitem__(self, index: Any) -> Any:
        found = read_index(self._remote, index) if self._array is None else None
        return self.fetch()[index] if found is None else found

    def __repr__(self) -> str:
        return repr(self.fetch())
