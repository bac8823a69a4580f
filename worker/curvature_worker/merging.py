"""Merging what the shards of a data set made.

The child merges: it has torch and the device. It is handed the shards' files of what adds up, and one file that tells
of all shards; what consists of rows per sample stays in the shards' files, and the manifest lists them.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from curvature_protocol.jobs import JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest, Provenance, ResultGroup, StoredPart, TensorEntry
from curvature_state.manifests import read_manifest
from curvature_state.shards import list_shards
from curvature_state.turns import ClaimedJob
from curvature_worker.computing import compute
from curvature_worker.contact import Contact
from curvature_worker.errors import JobRefused
from curvature_worker.inbox import PARTS, part_name
from curvature_worker.launcher import Confined
from curvature_worker.manifest import INFO, SENSELESS, finite, read_error, read_group, senseless
from curvature_worker.orders import labelled, labels_of
from curvature_worker.testimony import take
from curvature_worker.tools import Tools


@dataclass(frozen=True)
class Merged:
    """The merged result.

    Attributes:
        files: label → file, of what was merged.
        child: in whose outbox there may be more.
    """

    manifest: Manifest
    files: Mapping[str, Path]
    child: Confined


def merge(tools: Tools, contact: Contact, job: ClaimedJob) -> Merged:
    """Have the shards of a job merged.

    Raises:
        JobRefused: a shard's result is gone, or they do not fit together.
    """
    contact.tell("merging")
    shards = _manifests(tools, job)
    files = _files(tools, contact, job, shards)
    contact.lap("fetch")
    with closing(_Told(tools.scratch / f"parts-{job.id}-{job.attempt}.json")) as told:
        told.path.write_text(json.dumps([_part(place, shard, files) for place, shard in enumerate(shards)]))
        order = {
            "kind": "merge",
            "reduction": job.request["reduction"],
            "extensions": labelled(job.request["extensions"]),
        }
        reply, child = compute(tools, contact, job, order, {**files, PARTS: told.path})
    try:
        found = {group["label"]: group for group in reply["groups"]}
        merged = {
            label: take(child, f"{label}.safetensors")
            for label in labels_of(job.request)
            if found[label].get("appended") is None
        }
        manifest = _manifest(job, child, reply, shards, merged)
    except JobRefused:
        tools.pool.discard(job.tenant)
        raise
    except SENSELESS as error:
        tools.pool.discard(job.tenant)
        raise senseless(error) from error
    contact.lap("check")
    return Merged(manifest, merged, child)


class _Told:
    """A file that goes when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


def _manifests(tools: Tools, job: ClaimedJob) -> list[Manifest]:
    """The shards' manifests, in the order of their parts."""
    shards = list_shards(tools.database, job.id)
    if len(shards) != job.parts or any(shard.status != JobStatus.SUCCEEDED for shard in shards):
        raise JobRefused("internal_error", "not every part of the data set has been computed")
    try:
        return [read_manifest(tools.objects, shard.id, shard.attempt) for shard in shards]
    except FileNotFoundError as error:
        raise JobRefused(
            "result_not_found", "the result of a part was removed before all were merged", remedy="submit the job again"
        ) from error


def _files(tools: Tools, contact: Contact, job: ClaimedJob, shards: Sequence[Manifest]) -> dict[str, Path]:
    """Name in the inbox → file, of the shards' states that are to be merged."""
    kinds = {entry.name: entry.merging for entry in tools.catalogue().extensions}
    appended = {e["label"] for e in labelled(job.request["extensions"]) if kinds.get(e["name"]) == "append"}
    found = {}
    for place, shard in enumerate(shards):
        for number, group in enumerate(shard.groups):
            if group.label in appended:
                continue
            key = _key(shard, group)
            path = tools.cache.fetch(key, contact.check)
            if path is None:
                raise JobRefused("result_not_found", f"{key} was removed before it was merged")
            found[part_name(place, number)] = path
    return found


def _key(shard: Manifest, group: ResultGroup) -> str:
    if group.source is None:
        return result_key(shard.job_id, shard.attempt, f"{group.label}.safetensors")
    return result_key(group.source.job_id, group.source.attempt, f"{group.source.label}.safetensors")


def _part(place: int, shard: Manifest, files: Mapping[str, Path]) -> dict[str, Any]:
    """What the child is told of a shard."""
    info = {name: getattr(shard, name) for name in INFO}
    error = None if shard.precision_error is None else shard.precision_error.model_dump()
    return {
        "loss": shard.loss,
        "info": {**info, "precision_error": error, "part": None if shard.part is None else shard.part.model_dump()},
        "warnings": list(shard.warnings),
        "groups": {
            group.label: {
                "missing": group.missing,
                "provenance": {tensor.name: tensor.provenance.model_dump() for tensor in group.tensors},
                "file": name if (name := part_name(place, number)) in files else None,
                "layout": {tensor.name: [list(tensor.shape), tensor.dtype] for tensor in group.tensors},
            }
            for number, group in enumerate(shard.groups)
        },
    }


def _manifest(
    job: ClaimedJob, child: Confined, reply: dict[str, Any], shards: Sequence[Manifest], merged: Mapping[str, Path]
) -> Manifest:
    info = {name: reply["info"][name] for name in INFO}
    told = dict.fromkeys([*job.request.get("warnings", []), *reply["warnings"]])
    groups = {group["label"]: group for group in reply["groups"]}
    return Manifest(
        job_id=job.id,
        attempt=job.attempt,
        created_at=datetime.now(UTC),
        loss=reply["loss"],
        isolation=str(child.greeting["isolation"]),
        groups=tuple(
            read_group(groups[label], merged[label]) if label in merged else _appended(groups[label], shards)
            for label in labels_of(job.request)
        ),
        warnings=tuple(told),
        precision_error=read_error(reply["info"]),
        timings_ms={"compute": finite(reply["timings_ms"]["compute"])},
        samples=int(reply["info"]["samples"]),
        parts=len(shards),
        **{**info, "Z": finite(info["Z"])},
    )


def _appended(said: dict[str, Any], shards: Sequence[Manifest]) -> ResultGroup:
    """A quantity whose rows stay where the shards stored them."""
    label, axis = said["label"], int(said["appended"]["axis"])
    multiplier = finite(said["appended"]["factor"])
    groups = [(shard, next(group for group in shard.groups if group.label == label)) for shard in shards]
    tensors = []
    for name, (shape, dtype) in said["appended"]["layout"].items():
        parts = [_stored(shard, group, name, dtype) for shard, group in groups]
        length = sum(part.shape[axis] for part in parts)
        if list(shape) != [*parts[0].shape[:axis], length, *parts[0].shape[axis + 1 :]]:
            raise ValueError(f"the parts of {name} do not make {shape}")
        tensors.append(
            TensorEntry(
                name=name,
                parameter=None if said["kind"] == "tensor" else name,
                dtype=dtype,
                shape=tuple(shape),
                byte_start=0,
                byte_end=sum(part.byte_end - part.byte_start for part in parts),
                provenance=Provenance(
                    **{**said["provenance"][name], "Z": finite(said["provenance"][name]["Z"]), "cached_from": None}
                ),
                parts=tuple(parts),
                axis=axis,
                multiplier=multiplier,
            )
        )
    return ResultGroup(
        label=label,
        extension=said["extension"],
        options=said["options"],
        kind=said["kind"],
        convention=said["convention"],
        file_bytes=0,
        missing=said["missing"],
        tensors=tuple(tensors),
    )


def _stored(shard: Manifest, group: ResultGroup, name: str, dtype: str) -> StoredPart:
    tensor = next(tensor for tensor in group.tensors if tensor.name == name)
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} in one part and {dtype} in another")
    where = (shard.job_id, shard.attempt, group.label)
    if group.source is not None:
        where = (group.source.job_id, group.source.attempt, group.source.label)
    return StoredPart(
        job_id=where[0],
        attempt=where[1],
        label=where[2],
        shape=tensor.shape,
        byte_start=tensor.byte_start,
        byte_end=tensor.byte_end,
    )
