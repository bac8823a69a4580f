"""A program's digest: the same for every file of one model, another for every other model.

Files of one model differ in bytes (names that TorchScript mangles, identifiers of the saving, places in source files,
the archive's order); what decides results does not. So the program is told in a canonical way, every number by its
bytes, and hashed. In doubt more is told: two files of one model that get two digests cost a computation, two models
with one digest would be wrong numbers.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvature_engine.stores import bytes_of

_PIECE_BYTES = 2**26


class Digest:
    """Takes what a program is made of, one thing after another; every one is told with its kind and length."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._storages: dict[int, int] = {}

    def hexdigest(self) -> str:
        """64 hexadecimal digits."""
        return self._hash.hexdigest()

    def add(self, *values: Any) -> None:
        """Take values: numbers, texts, tensors, and what holds them."""
        for value in values:
            self._add(value)

    def add_unlike(self) -> None:
        """Take what cannot be told: the digest will be like no other, nor like itself another time."""
        self._token(b"unlike", os.urandom(32))

    def _add(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, Mapping):
            self._token(b"mapping", len(value).to_bytes(8, "little"))
            for key, held in value.items():
                self.add(key, held)
        elif isinstance(value, list | tuple):
            self._token(type(value).__name__.encode(), len(value).to_bytes(8, "little"))
            self.add(*value)
        elif isinstance(value, float):
            self._token(b"float", struct.pack("<d", value))
        elif isinstance(value, complex):
            self._token(b"complex", struct.pack("<dd", value.real, value.imag))
        elif isinstance(value, str):
            self._token(b"str", value.encode())
        elif value is None or isinstance(value, bool | int | torch.dtype | torch.device | torch.layout):
            self._token(type(value).__name__.encode(), str(value).encode())
        else:
            self.add_unlike()

    def _add_tensor(self, tensor: Tensor) -> None:
        """Its numbers, how they lie, and with which tensors before it they share memory."""
        tensor = tensor.detach() if not tensor.requires_grad else tensor
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
            self.add_unlike()
            return
        place = tensor.untyped_storage().data_ptr()
        storage = self._storages.setdefault(place, len(self._storages)) if place else -1
        self._token(b"tensor", str((tensor.dtype, tensor.is_conj(), tensor.is_neg(), tensor.requires_grad)).encode())
        self.add(tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), storage)
        plain = tensor.detach().resolve_conj().resolve_neg()
        self._hash.update((plain.numel() * plain.element_size()).to_bytes(8, "little"))
        for piece in _pieces(plain):
            self._hash.update(bytes_of(piece))

    def _token(self, kind: bytes, content: bytes) -> None:
        for part in (kind, content):
            self._hash.update(len(part).to_bytes(8, "little"))
            self._hash.update(part)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's numbers in the order of its indices, in pieces on the CPU."""
    flat = tensor.contiguous().view(-1)
    size = max(1, flat.numel() if flat.device.type == "cpu" else _PIECE_BYTES // flat.element_size())
    for first in range(0, flat.numel(), size):
        yield flat[first : first + size].cpu()
