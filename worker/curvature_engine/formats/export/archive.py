"""A `.pt2` archive: the program's description, and the tensors beside it."""

import json
import zipfile
from collections.abc import Collection, Mapping
from typing import IO, Any

import torch
from torch import Tensor, nn

from curvature_engine.formats.export.schema import DTYPES, read_size

PROGRAM = "models/model.json"
_FOLDERS = {"weights": "data/weights", "constants": "data/constants"}
_STRIDED = 7
_PIECE_BYTES = 2**20


class Archive:
    """An open archive; its entries lie in one folder, whatever that is called."""

    def __init__(self, file: str | IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        self._root = next((name.split("/", 1)[0] for name in self._zip.namelist()), "")

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def program(self) -> dict[str, Any]:
        """The program's description."""
        if self._bytes("archive_format") != b"pt2":
            raise ValueError("its archive_format is not pt2")
        if "byteorder" in self._entries() and self._bytes("byteorder") != b"little":
            raise ValueError("its tensors are not little-endian")
        described: dict[str, Any] = json.loads(self._bytes(PROGRAM))
        return described

    def tensors(self, kind: str, device: torch.device) -> dict[str, Tensor]:
        """`weights` (parameters and buffers) or `constants`, by name.

        What shared memory when it was saved shares it again: such tensors name the same entry.
        """
        folder = _FOLDERS[kind]
        config = json.loads(self._bytes(f"{folder}/model_{kind}_config.json"))["config"]
        storages: dict[str, torch.UntypedStorage] = {}
        found: dict[str, Tensor] = {}
        for name, entry in config.items():
            meta, path = entry["tensor_meta"], entry["path_name"]
            if entry["use_pickle"] or meta is None or meta["layout"] != _STRIDED:
                raise ValueError(f"{name} is no ordinary tensor (pickled, sparse, or an object)")
            if path not in storages:
                storages[path] = self._storage(f"{folder}/{path}", device)
            found[name] = _tensor(storages[path], meta, is_parameter=bool(entry["is_param"]))
        return found

    def _storage(self, entry: str, device: torch.device) -> torch.UntypedStorage:
        info = self._zip.getinfo(f"{self._root}/{entry}")
        buffer = bytearray(info.file_size)
        read = 0
        with self._zip.open(info) as file:
            while part := file.read(_PIECE_BYTES):
                buffer[read : read + len(part)] = part
                read += len(part)
        if read != len(buffer) or read != info.file_size:
            raise ValueError(f"{entry} has {read} bytes, not {info.file_size}")
        held = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)
        return held.to(device).untyped_storage()

    def _bytes(self, entry: str) -> bytes:
        return self._zip.read(f"{self._root}/{entry}").strip() if entry in self._entries() else b""

    def _entries(self) -> Collection[str]:
        return {name.split("/", 1)[-1] for name in self._zip.namelist()}


def _tensor(storage: torch.UntypedStorage, meta: Mapping[str, Any], *, is_parameter: bool) -> Tensor:
    """A view of `storage`; torch refuses one that reaches beyond it."""
    sizes, strides = ([_whole(s) for s in meta[key]] for key in ("sizes", "strides"))
    dtype = DTYPES[meta["dtype"]]
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    if 0 in sizes:
        tensor = tensor.new_empty(sizes)
    else:
        needed = _whole(meta["storage_offset"]) + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1
        if needed * tensor.element_size() > storage.nbytes() or min([0, *strides]) < 0:
            raise ValueError(f"a tensor of sizes {sizes} needs more than the {storage.nbytes()} bytes that are there")
        tensor.set_(storage, _whole(meta["storage_offset"]), sizes, strides)
    if is_parameter or meta["requires_grad"]:
        return nn.Parameter(tensor, requires_grad=bool(meta["requires_grad"]))
    return tensor


def _whole(size: Mapping[str, Any]) -> int:
    found = read_size(size)
    if not isinstance(found, int) or found < 0:
        raise ValueError(f"a stored tensor has size {found!r}")
    return found
