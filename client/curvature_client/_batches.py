"""A batch as given, and the safetensors file that carries it.

Given: a pair (inputs, targets), a dictionary {"inputs": tensor or tuple or dictionary, "targets": tensor}, or a path to
a safetensors or .npz file. Tensors may be torch's or NumPy's, on any device, in any layout of memory.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import safetensors
import safetensors.numpy

from curvature_client._errors import refusal
from curvature_client._payloads import IN_MEMORY_BYTES, Payload, existing_file
from curvature_protocol.names import INPUTS, TARGETS

_TYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{
        f"{letter}{bits}": f"{word}{bits}" for letter, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
    "BF16": "bfloat16",
    "BOOL": "bool",
    "C64": "complex64",
}
"""safetensors' name of a type → torch's and NumPy's."""


class Batch:
    """A batch in one of the accepted forms."""

    def __init__(self, given: Any) -> None:
        self._path: Path | None = None
        self._tensors: dict[str, Any] | None = None
        if isinstance(given, str | os.PathLike):
            path = existing_file(Path(given), "batch")
            if path.suffix == ".npz":
                self._tensors = _read_npz(path)
            else:
                self._path = path
        else:
            self._tensors = _name_tensors(*_split(given))
        if self._tensors is not None:
            _check(self._tensors)

    def payload(self, folder: Path) -> Payload:
        """The file that the server reads; `folder` holds it if it is large."""
        if self._path is not None:
            return Payload.of_file(self._path)
        assert self._tensors is not None
        if any(_is_torch(tensor) for tensor in self._tensors.values()):
            return _save_torch(self._tensors, folder)
        return _save_numpy(self._tensors, folder)

    @property
    def samples(self) -> int:
        """N: rows of the targets.

        Raises:
            UnprocessableError: the targets have no rows, or are not there.
        """
        shape = self.layout.get(TARGETS, ("", ()))[1]
        if not shape:
            raise refusal(
                "invalid_targets",
                "a batch's targets have a row for each sample; these have no axes"
                if TARGETS in self.layout
                else f"the batch has no targets; it holds {', '.join(self.layout) or 'nothing'}",
                param=TARGETS,
                remedy="give batches, not single samples, e.g. DataLoader(dataset, batch_size=64)",
            )
        return shape[0]

    @cached_property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor → its type and shape; of a file, by its header alone."""
        if self._path is not None:
            with _opened(self._path) as file:
                slices = {name: file.get_slice(name) for name in sorted(file.keys())}
                return {
                    name: (_TYPES.get(each.get_dtype(), each.get_dtype()), tuple(each.get_shape()))
                    for name, each in slices.items()
                }
        assert self._tensors is not None
        found = {name: (_type_of(tensor), tuple(tensor.shape)) for name, tensor in self._tensors.items()}
        return dict(sorted(found.items()))

    def example_inputs(self) -> tuple[Any, ...] | dict[str, Any]:
        """The inputs as torch tensors on the CPU: positional as a tuple, by name as a dictionary."""
        import torch
        from safetensors.torch import load_file

        if self._path is not None:
            with _opened(self._path):
                tensors = load_file(self._path)
        else:
            assert self._tensors is not None
            tensors = {
                name: tensor.detach().cpu() if _is_torch(tensor) else torch.from_numpy(_plain(tensor).copy())
                for name, tensor in self._tensors.items()
            }
        return _inputs_of(tensors)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise refusal(
            "invalid_batch",
            f"{path} is no safetensors file ({error})",
            param="batch",
            remedy="save it with safetensors.torch.save_file",
        ) from None


def _type_of(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.") if _is_torch(tensor) else tensor.dtype.newbyteorder("=").name


def _split(given: Any) -> tuple[Any, Any]:
    if isinstance(given, Mapping):
        if set(given) == {INPUTS, TARGETS}:
            return given[INPUTS], given[TARGETS]
        received = f"a dictionary with {', '.join(map(repr, given)) or 'nothing'}"
    elif isinstance(given, tuple | list):
        if len(given) == 2:
            return given[0], given[1]
        received = f"{len(given)} values"
    else:
        received = type(given).__name__
    raise refusal(
        "invalid_batch",
        f'a batch is (inputs, targets), {{"inputs": …, "targets": …}}, or a path; got {received}',
        param="batch",
        remedy="give one batch, e.g. next(iter(loader)); several inputs as "
        '{"inputs": (first, second), "targets": targets}',
    )


def _name_tensors(inputs: Any, targets: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        for name, tensor in inputs.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise refusal(
                    "invalid_batch",
                    f"inputs by name are keyed by the names of forward's arguments; got {name!r}",
                    param="inputs",
                    remedy="rename it, or give inputs by place as a tuple",
                )
            named[f"{INPUTS}.{name}"] = tensor
    elif isinstance(inputs, tuple | list):
        named = {f"{INPUTS}.{i}": tensor for i, tensor in enumerate(inputs)}
    else:
        named[INPUTS] = inputs
    if not named:
        raise refusal("invalid_batch", "no inputs were given", param="inputs", remedy="give what forward takes")
    return {**{name: _tensor(name, value) for name, value in named.items()}, TARGETS: _tensor(TARGETS, targets)}


def _tensor(name: str, value: Any) -> Any:
    if _is_torch(value):
        if value.layout is sys.modules["torch"].strided and not value.is_quantized:
            return value
        received = f"a tensor of layout {value.layout}"
    elif isinstance(value, np.ndarray) or (hasattr(value, "__array__") and not isinstance(value, type)):
        array = np.asarray(value)
        if array.dtype.kind in "biufc":
            return array
        received = f"an array of dtype {array.dtype}"
    else:
        received = type(value).__name__
    raise refusal(
        "invalid_targets" if name == TARGETS else "invalid_inputs",
        f"{name} must be a torch.Tensor or a NumPy array of numbers; got {received}",
        param=name,
        remedy="convert it, e.g. with torch.as_tensor",
    )


def _check(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if tuple(tensor.shape)[:1] == (0,):
            raise refusal(
                "empty_batch",
                f"{name} has shape {list(tensor.shape)}: the batch has no samples",
                param=TARGETS if name == TARGETS else INPUTS,
                remedy="give at least one sample",
            )


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise refusal(
            "invalid_batch",
            f"{path} is no .npz file of numbers ({error})",
            param="batch",
            remedy="save it with numpy.savez",
        ) from None
    if set(arrays) == {"arr_0", "arr_1"}:  # numpy.savez(path, inputs, targets)
        arrays = {INPUTS: arrays["arr_0"], TARGETS: arrays["arr_1"]}
    known = {name for name in arrays if name in (INPUTS, TARGETS) or name.startswith(f"{INPUTS}.")}
    if TARGETS not in known or len(known) < 2 or known != set(arrays):
        raise refusal(
            "invalid_batch",
            f"{path} must hold inputs (or inputs.0, …) and targets; it holds {', '.join(arrays) or 'nothing'}",
            param="batch",
            remedy="save it with numpy.savez(path, inputs=…, targets=…)",
        )
    return {name: _tensor(name, array) for name, array in arrays.items()}


def _inputs_of(tensors: Mapping[str, Any]) -> tuple[Any, ...] | dict[str, Any]:
    if INPUTS in tensors:
        return (tensors[INPUTS],)
    prefix = f"{INPUTS}."
    named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if named and all(name.isdecimal() for name in named):
        return tuple(named[name] for name in sorted(named, key=int))
    return named


def _save_torch(tensors: Mapping[str, Any], folder: Path) -> Payload:
    import torch
    from safetensors.torch import save, save_file

    saved: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, value in tensors.items():
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(_plain(value).copy())
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # The format refuses tensors that share memory, such as targets that are the inputs.
        storage = tensor.untyped_storage().data_ptr()
        saved[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    if sum(tensor.nbytes for tensor in saved.values()) <= IN_MEMORY_BYTES:
        return Payload.of_bytes(save(saved))
    path = folder / "batch.safetensors"
    save_file(saved, path)
    return Payload.of_file(path)


def _save_numpy(tensors: Mapping[str, np.ndarray], folder: Path) -> Payload:
    saved = {name: _plain(array) for name, array in tensors.items()}
    if sum(array.nbytes for array in saved.values()) <= IN_MEMORY_BYTES:
        return Payload.of_bytes(safetensors.numpy.save(saved))
    path = folder / "batch.safetensors"
    safetensors.numpy.save_file(saved, path)
    return Payload.of_file(path)


def _plain(array: np.ndarray) -> np.ndarray:
    """Contiguous, in this machine's byte order."""
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)
