"""The header of a safetensors file that an untrusted process wrote, every claim in it checked against the file."""

import json
import os
import stat
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

_MAX_HEADER_BYTES = 100 * 2**20
_LENGTH = struct.Struct("<Q")
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class StoredTensor(NamedTuple):
    """One tensor; `start` and `end` count from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class StoredFile(NamedTuple):
    """A file's tensors, in the order in which they lie, and its size."""

    tensors: tuple[StoredTensor, ...]
    size_bytes: int


def read_stored_file(path: Path) -> StoredFile:
    """Read and check a header.

    Raises:
        ValueError: if the file is not what it claims; the message says in what.
    """
    header, data_start, size = _read_header(path)
    header.pop("__metadata__", None)
    tensors = sorted((_read_tensor(name, claim, data_start) for name, claim in header.items()), key=lambda t: t[3:])
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            raise ValueError(f"{path.name}: {tensor.name} does not begin where its predecessor ends")
        at = tensor.end
    if at != size:
        raise ValueError(f"{path.name} has {size} bytes, its tensors end at {at}")
    return StoredFile(tuple(tensors), size)


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(claims by name, where the data begin, file size)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise ValueError(f"{path.name} is no regular file of its own")
        if status.st_size < _LENGTH.size:
            raise ValueError(f"{path.name} has {status.st_size} bytes, too few for a header")
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        if length > min(_MAX_HEADER_BYTES, status.st_size - _LENGTH.size):
            raise ValueError(f"{path.name} has an impossible header")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError(f"{path.name} has a header nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has a header that is no JSON object")
    return header, _LENGTH.size + length, status.st_size


def _read_tensor(name: str, claim: Any, data_start: int) -> StoredTensor:
    if not isinstance(claim, dict):
        raise ValueError(f"{name} is not described")
    dtype, shape, offsets = claim.get("dtype"), claim.get("shape"), claim.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"{name} has no known dtype")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has no shape or place")
    if offsets[1] - offsets[0] != prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{name} has not the bytes that its shape and dtype need")
    return StoredTensor(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)
