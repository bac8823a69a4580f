"""Results: a mapping from label to group, from parameter to tensor, fetched when used.

result["diag_ggn_mc"]["0.weight"]    a tensor
result["kfac"]["0.weight"].B         a factor
result["batch_loss"]                 quantities that are one tensor have no parameters
"""

import base64
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from curvature_client._downloads import ResultFiles
from curvature_client._errors import CurvatureError, refusal
from curvature_client._remote import LazyArray, Remote, RemoteTensor, stored_bytes
from curvature_client._shards import PartedTensor
from curvature_client._transport import Transport
from curvature_protocol.jobs import InlineResult
from curvature_protocol.results import Manifest, TensorEntry
from curvature_protocol.results import ResultGroup as GroupEntry

if TYPE_CHECKING:
    import torch


class KroneckerFactors(NamedTuple):
    """A parameter's curvature block as B ⊗ A, on the row-major weight; for a bias A is None and the block is B."""

    B: "torch.Tensor"
    A: "torch.Tensor | None"


class ResultGroup(Mapping[str, Any]):
    """What one requested extension returned: parameter → tensor, or pair of factors.

    Shared parameters answer to all their names. Without torch, tensors are arrays of NumPy.
    """

    def __init__(self, entry: GroupEntry, files: ResultFiles, aliases: Mapping[str, str]) -> None:
        self._entry, self._files, self._aliases = entry, files, aliases
        self._made: dict[str, Any] = {}
        self._by_parameter: dict[str, dict[str | None, TensorEntry]] = {}
        for tensor in entry.tensors:
            if tensor.parameter is not None:
                self._by_parameter.setdefault(tensor.parameter, {})[tensor.factor] = tensor

    @property
    def label(self) -> str:
        """Its name in this result."""
        return self._entry.label

    @property
    def extension(self) -> str:
        """The extension that computed it."""
        return self._entry.extension

    @property
    def options(self) -> dict[str, Any]:
        """The extension's options, complete."""
        return dict(self._entry.options)

    @property
    def convention(self) -> str:
        """What the numbers mean, to the factor 1/N."""
        return self._entry.convention

    @property
    def missing(self) -> dict[str, str]:
        """Parameter → why it has no entry."""
        return dict(self._entry.missing)

    @property
    def nbytes(self) -> int:
        """The size of all its tensors."""
        return sum(map(stored_bytes, self._entry.tensors))

    @property
    def cached_from(self) -> str | None:
        """The job that computed it before, if it was taken from the cache."""
        if self._entry.source is not None:
            return self._entry.source.job_id
        return next((t.provenance.cached_from for t in self._entry.tensors if t.provenance.cached_from), None)

    def entry(self, parameter: str, factor: str | None = None) -> TensorEntry:
        """The manifest's entry of one tensor: shape, place, provenance."""
        parameter = self._aliases.get(parameter, parameter)
        for tensor in self._entry.tensors:
            if tensor.parameter == parameter and factor in (None, tensor.factor):
                return tensor
        raise KeyError(self._absence(parameter))

    def __getitem__(self, parameter: str) -> Any:
        found = self._by_parameter.get(self._aliases.get(parameter, parameter))
        if found is None:
            raise KeyError(self._absence(parameter))
        if self._entry.kind != "factors":
            return self._tensor(found[None])
        return KroneckerFactors(self._tensor(found["B"]), self._tensor(found["A"]) if "A" in found else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_parameter)

    def __len__(self) -> int:
        return len(self._by_parameter)

    def __repr__(self) -> str:
        return f"<{self.label}: {len(self)} parameters, {_size(self.nbytes)}>"

    def _tensor(self, entry: TensorEntry) -> Any:
        """The tensor of an entry, made at its first use and kept with what it fetched."""
        if entry.name not in self._made:
            self._made[entry.name] = _lazy(self._remote(entry))
        return self._made[entry.name]

    def _remote(self, entry: TensorEntry) -> Remote:
        if entry.parts:
            return PartedTensor(entry, self._files.of_part)
        return RemoteTensor(entry, self._files.of(self.label))

    def _only(self) -> Any:
        """The one tensor of a quantity without parameters."""
        return self._tensor(self._entry.tensors[0])

    def _absence(self, parameter: str) -> str:
        name = self._aliases.get(parameter, parameter)
        if name in self._entry.missing:
            return f"{self.label} has no entry for {parameter}: {self._entry.missing[name]}"
        return f"{self.label} has no parameter {parameter!r}; it has {', '.join(self._by_parameter)}"


class Result(Mapping[str, Any]):
    """The result of one job. Tensors are read from the server when their numbers are used.

    Attributes:
        manifest: every tensor's name, shape, type, place, convention and provenance.
    """

    def __init__(self, manifest: Manifest, files: ResultFiles) -> None:
        self.manifest = manifest
        self._groups = {group.label: ResultGroup(group, files, manifest.aliases) for group in manifest.groups}

    @property
    def loss(self) -> float:
        """The loss L; NaN where it is not finite."""
        return math.nan if self.manifest.loss is None else self.manifest.loss

    @property
    def warnings(self) -> list[str]:
        """What the client, the engine and the worker noticed."""
        return list(self.manifest.warnings)

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(group.nbytes for group in self._groups.values())

    @property
    def from_cache(self) -> dict[str, str]:
        """Label → the job that computed it before, of what was taken from the cache."""
        found = {label: group.cached_from for label, group in self._groups.items()}
        return {label: job_id for label, job_id in found.items() if job_id is not None}

    def __getitem__(self, label: str) -> Any:
        if label not in self._groups:
            raise KeyError(f"there is no result labelled {label!r}; there are {', '.join(self._groups)}")
        group = self._groups[label]
        return group._only() if group._entry.kind == "tensor" else group

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        cached = f"; from the cache: {', '.join(self.from_cache)}" if self.from_cache else ""
        holds = f"{', '.join(self)}; {_size(self.nbytes)}{cached}"
        return f"<Result of job {self.manifest.job_id}: loss {self.loss:.6g}; {holds}>"

    def fetch_all(self, *, max_bytes: int = 8 * 2**30) -> "Result":
        """Read every tensor into memory; afterwards nothing needs the server.

        Raises:
            CurvatureError: if there are more than `max_bytes`; nothing is read then.
        """
        if self.nbytes > max_bytes:
            raise CurvatureError(
                f"the result has {_size(self.nbytes)}, more than max_bytes={max_bytes}",
                code="result_too_large",
                param="max_bytes",
                remedy="raise max_bytes, use result.save(path), or read single tensors",
            )
        for group in self._groups.values():
            for tensor in group._entry.tensors:
                group._tensor(tensor).fetch()
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one safetensors file, streamed: memory stays flat.

        Tensors are named `{label}/{parameter}[/{factor}]` (`{label}` where a quantity is one tensor); the file's
        metadata hold the manifest under `curvature_manifest`.
        """
        target = checked_target(path)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                file.write(self._header())
                for label, tensor in self._ordered():
                    self._groups[label]._remote(tensor).stream(file.write)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def _header(self) -> bytes:
        """The file's beginning as the format says: length, then JSON, padded to eight bytes."""
        header: dict[str, Any] = {"__metadata__": {"curvature_manifest": self.manifest.model_dump_json()}}
        place = 0
        for label, tensor in self._ordered():
            name = label if tensor.parameter is None else f"{label}/{tensor.name}"
            end = place + stored_bytes(tensor)
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [place, end]}
            place = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _ordered(self) -> list[tuple[str, TensorEntry]]:
        """All tensors with their labels, the widest types first: so each stays aligned to its own type."""
        tensors = [(group.label, tensor) for group in self.manifest.groups for tensor in group.tensors]
        return sorted(tensors, key=lambda item: -_item_bytes(item[1]))


def checked_target(path: str | os.PathLike[str]) -> Path:
    """A path that a file may be written to.

    Raises:
        UnprocessableError: it is a folder, or in one that does not exist or may not be written.
    """
    target = Path(path)
    if target.is_dir():
        reason = "is a folder"
    elif not target.parent.is_dir():
        reason = f"lies in a folder that does not exist ({target.parent})"
    elif not os.access(target.parent, os.W_OK):
        reason = f"lies in a folder that may not be written ({target.parent})"
    else:
        return target
    raise refusal("invalid_request", f"{target} {reason}", param="path", remedy="choose another path")


def stored_result(transport: Transport, manifest: Manifest) -> Result:
    """The result as the server stores it."""
    return Result(manifest, ResultFiles(transport, manifest))


def inline_result(transport: Transport, inline: InlineResult) -> Result:
    """The result that came inside a job."""
    files = {label: base64.b64decode(data) for label, data in inline.files.items()}
    return Result(inline.manifest, ResultFiles(transport, inline.manifest, files))


def _item_bytes(tensor: TensorEntry) -> int:
    return stored_bytes(tensor) // max(1, math.prod(tensor.shape))


def _lazy(remote: Remote) -> Any:
    if not _has_torch():
        return LazyArray(remote)
    from curvature_client._tensors import LazyTensor

    return LazyTensor(remote)


@cache
def _has_torch() -> bool:
    return find_spec("torch") is not None


def _size(count: int) -> str:
    if count < 2**10:
        return f"{count} bytes"
    unit, power = next((u, p) for u, p in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if count >= 2**p)
    return f"{count / 2**power:.1f} {unit}"
