"""From a sweep's request to rows in the database: expanded, checked, written at once, and the bell rung."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from curvature_protocol.sweeps import MOST_ROWS, Sweep, SweepRequest
from curvature_service.bells import Kind, ring
from curvature_service.errors import ApiError
from curvature_service.extensions.service import CatalogueCache
from curvature_service.jobs.submission import MAX_REQUEST_BYTES, full, missing, shards
from curvature_service.resources import Resources
from curvature_service.sweeps.checking import DEFAULTS, CheckedField, FieldChecker, stored_request
from curvature_service.sweeps.expansion import ExpandedRow, axes_of, expand
from curvature_service.webhooks.urls import check_url
from curvature_state.artefacts import ArtefactMissing, Reference
from curvature_state.jobs import NewJob, SweepPlace
from curvature_state.sweeps import CreatedSweep, NewSweep, create_sweep, find_by_key
from curvature_state.tenants import QueueFull

MOST_JOBS = 2 * MOST_ROWS
"""Of one sweep, the shards of data sets included."""
MOST_STORED_BYTES = 256 * 2**20
"""Of the requests of all rows, as the database holds them: a short body can be many rows of a long one."""
MAX_BODY_BYTES = 64 * 2**20
_REFERRING = ("model", "batch", "extensions", "loss")
"""Fields that can refer to uploads."""


def submit_sweep(
    resources: Resources, tenant: str, catalogue: CatalogueCache, request: SweepRequest, idempotency_key: str | None
) -> tuple[Sweep, bool]:
    """Write the sweep and all its jobs, ring the bell; returns the sweep and whether it is new.

    Raises:
        ApiError: whatever a row lacks, and where in the request that stands. Nothing is written then.
    """
    digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    # Before any check: what was accepted once stays accepted, whatever became of models, batches and catalogue since.
    found = find_by_key(resources.database, tenant, idempotency_key)
    if found is None:
        if request.webhook is not None:
            check_url(resources.settings, request.webhook.url)
        empty = NewSweep((), axes_of(request), digest, idempotency_key, tenant, request.metadata, request.webhook)
        checker = FieldChecker(resources, catalogue.current())
        new = replace(empty, jobs=list(_jobs(empty, expand(request), checker)))
        found = _create(resources, new)
        if not found.repeated:
            ring(resources, _bells(new.jobs))
    if found.repeated and found.body_digest != digest:
        raise ApiError(
            "idempotency_conflict",
            f"the idempotency key {idempotency_key!r} was used with another body, for sweep {found.sweep.id}",
            param="Idempotency-Key",
            remedy="use a new key for a new request",
        )
    return found.sweep, not found.repeated


def _create(resources: Resources, new: NewSweep) -> CreatedSweep:
    try:
        return create_sweep(resources.database, new)
    except ArtefactMissing as error:  # removed at this moment
        raise missing(error) from error
    except QueueFull as error:
        raise full(error) from error


def _jobs(sweep: NewSweep, rows: Iterable[ExpandedRow], checker: FieldChecker) -> Iterator[NewJob]:
    """The sweep's jobs, in order."""
    # Most rows refer to the same few combinations of uploads.
    artefacts: dict[tuple[int, ...], frozenset[Reference]] = {}
    stored_bytes = jobs = 0
    for place, row in enumerate(rows):
        fields = checker.check(row)
        referring = [fields[name] for name in _REFERRING if name in fields]
        key = tuple(id(field) for field in referring)
        if key not in artefacts:
            artefacts[key] = frozenset().union(*(field.artefacts for field in referring))
        job = _job(sweep, place, row, fields, artefacts[key])
        jobs += 1 + len(job.parts)
        stored_bytes += sum(field.size for field in fields.values()) + len(json.dumps(row.coordinates))
        _check_totals(place, jobs, stored_bytes)
        yield job


def _job(
    sweep: NewSweep, place: int, row: ExpandedRow, fields: dict[str, CheckedField], artefacts: frozenset[Reference]
) -> NewJob:
    size = sum(field.size for name, field in fields.items() if name != "batch")
    if size > MAX_REQUEST_BYTES:
        largest = max((name for name in fields if name != "batch"), key=lambda name: fields[name].size)
        raise ApiError(
            "payload_too_large",
            f"row {place}: a request may have {MAX_REQUEST_BYTES} bytes without its batch; it has {size}",
            param=row.origins[largest],
            remedy="shorten metadata, options and warnings",
        )
    given = {name: field.value for name, field in fields.items()}
    job = NewJob(
        stored_request(fields),
        sweep.body_digest,
        tenant=sweep.tenant,
        priority=given.get("priority", DEFAULTS["priority"]),
        metadata=given.get("metadata", {}),
        artefacts=artefacts,
        sweep=SweepPlace(sweep.id, place, dict(row.coordinates)),
    )
    if "requires" in given:
        job = replace(job, requires=given["requires"])
    parts = fields["batch"].parts
    return replace(job, parts=tuple(shards(job, parts))) if parts else job


def _check_totals(place: int, jobs: int, stored_bytes: int) -> None:
    if jobs > MOST_JOBS:
        what, limit = "jobs, those over parts of data sets included", MOST_JOBS
    elif stored_bytes > MOST_STORED_BYTES:
        what, limit = "bytes in the requests of all its rows", MOST_STORED_BYTES
    else:
        return
    raise ApiError(
        "payload_too_large",
        f"a sweep may have {limit} {what}; there are more from row {place} on",
        remedy="make several sweeps of it",
    )


def _bells(jobs: Iterable[NewJob]) -> dict[Kind, tuple[str, int]]:
    """What `ring` wants of jobs that are new: of those over data sets, their shards are queued."""
    first: dict[Kind, str] = {}
    counts: Counter[Kind] = Counter()
    for job in jobs:
        kind = (job.requires.gpu, job.requires.tag)
        first.setdefault(kind, job.parts[0].id if job.parts else job.id)
        counts[kind] += len(job.parts) or 1
    return {kind: (job_id, counts[kind]) for kind, job_id in first.items()}
