"""From the child's word and the files it wrote to a manifest. The files are checked; the child is not believed."""

import json
import os
import stat
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from curvature_protocol.results import Manifest, Provenance, ResultGroup, TensorEntry
from curvature_worker.errors import JobRefused

_MAX_HEADER_BYTES = 100 * 2**20


def build_manifest(
    reply: dict[str, Any],
    outbox: Path,
    labels: list[str],
    *,
    job_id: str,
    attempt: int,
    isolation: str,
    warnings: list[str],
    timings_ms: dict[str, float],
) -> Manifest:
    """The manifest of a finished computation.

    Raises:
        JobRefused: `internal_error` if the child's files are not what they must be.
    """
    try:
        groups = [_group(group, outbox) for group in reply["groups"]]
        if [g.label for g in groups] != labels:
            raise ValueError("labels differ from those asked for")
        info = reply["info"]
        return Manifest(
            job_id=job_id,
            attempt=attempt,
            created_at=datetime.now(UTC),
            loss=reply["loss"],
            isolation=isolation,
            groups=tuple(groups),
            warnings=(*warnings, *reply["warnings"]),
            timings_ms={**timings_ms, **reply["timings_ms"]},
            **info,
        )
    except (KeyError, TypeError, ValueError, OSError, struct.error) as error:
        raise JobRefused(
            "internal_error", f"the computing process left a result that makes no sense: {error}"
        ) from error


def _group(group: dict[str, Any], outbox: Path) -> ResultGroup:
    path = outbox / f"{group['label']}.safetensors"
    header, start, size = _read_header(path)
    entries = []
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = tensor["data_offsets"]
        if not 0 <= first <= last <= size - start:
            raise ValueError(f"{name} lies outside its file")
        parameter, factor = name, None
        if group["kind"] == "factors":
            parameter, _, factor = name.rpartition("/")
        entries.append(
            TensorEntry(
                name=name,
                parameter=None if group["kind"] == "tensor" else parameter,
                factor=factor,
                dtype=tensor["dtype"],
                shape=tuple(tensor["shape"]),
                byte_start=start + first,
                byte_end=start + last,
                provenance=Provenance(**group["provenance"][name]),
            )
        )
    return ResultGroup(
        label=group["label"],
        extension=group["extension"],
        options=group["options"],
        kind=group["kind"],
        convention=group["convention"],
        file_bytes=size,
        missing=group["missing"],
        tensors=tuple(entries),
    )


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(tensors by name, where the data begin, file size) of a safetensors file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} is no regular file")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(_MAX_HEADER_BYTES, status.st_size - 8):
            raise ValueError(f"{path.name} has an impossible header")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length, status.st_size
