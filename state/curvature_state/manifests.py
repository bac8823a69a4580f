"""Manifests in the store, and those that refer to what other jobs stored."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest, ResultGroup, Source
from curvature_state.cache import Cached
from curvature_state.objects import ObjectStore

MANIFEST = "manifest.json"


def read_manifest(objects: ObjectStore, job_id: str, attempt: int) -> Manifest:
    """The manifest of an attempt's result.

    Raises:
        FileNotFoundError: it was removed.
    """
    return Manifest.model_validate_json(objects.get_bytes(result_key(job_id, attempt, MANIFEST)))


def store_manifest(objects: ObjectStore, manifest: Manifest) -> int:
    """Store a manifest with its result; returns its size in bytes."""
    data = manifest.model_dump_json().encode()
    objects.put_bytes(result_key(manifest.job_id, manifest.attempt, MANIFEST), data)
    return len(data)


def cached_group(found: Manifest, cached: Cached, label: str) -> ResultGroup:
    """A group of another job's result under the label asked for now; its files stay where they are."""
    group = next(group for group in found.groups if group.label == cached.label)
    source = group.source or Source(job_id=cached.job_id, attempt=cached.attempt, label=cached.label)
    tensors = tuple(
        tensor.model_copy(
            update={
                "provenance": tensor.provenance.model_copy(
                    update={"cached_from": tensor.provenance.cached_from or cached.job_id}
                )
            }
        )
        for tensor in group.tensors
    )
    return group.model_copy(update={"label": label, "source": source, "tensors": tensors})


def sources_of(groups: Sequence[ResultGroup]) -> frozenset[str]:
    """The jobs whose files these groups refer to."""
    found = {group.source.job_id for group in groups if group.source is not None and group.file_bytes}
    parts = {part.job_id for group in groups for tensor in group.tensors for part in tensor.parts}
    return frozenset(found | parts)


def from_cache(
    found: Mapping[str, tuple[Cached, Manifest]], *, job_id: str, attempt: int, seed: int, warnings: Sequence[str]
) -> Manifest:
    """The manifest of a result all of whose quantities were computed before.

    Args:
        found: label → where it is stored, and the manifest there; in the order asked for.
        job_id: whose result it is.
        attempt: which attempt found it.
        seed: as asked for.
        warnings: what the client noticed.
    """
    _, first = next(iter(found.values()))
    told = dict.fromkeys([*warnings, *(warning for _, manifest in found.values() for warning in manifest.warnings)])
    return first.model_copy(
        update={
            "job_id": job_id,
            "attempt": attempt,
            "created_at": datetime.now(UTC),
            "seed": seed,
            "groups": tuple(cached_group(manifest, cached, label) for label, (cached, manifest) in found.items()),
            "warnings": tuple(told),
            "timings_ms": {},
        }
    )
