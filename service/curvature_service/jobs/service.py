"""Submitting, waiting for, and cancelling jobs."""

import asyncio
import base64
import hashlib
import json
import re
import time
from datetime import UTC, datetime

from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from curvature_protocol.jobs import FINAL, InlineResult, Job, JobKind, JobPage, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.requests import BatchReference, JobRequest, LossReference
from curvature_service.artefacts.service import get_artefact, store_small
from curvature_service.errors import ApiError
from curvature_service.extensions.service import CatalogueCache, check_request
from curvature_service.resources import Resources
from curvature_service.results.service import read_manifest
from curvature_state import broker, events
from curvature_state.jobs import Created, NewJob, create_job, find_by_key, get_job, list_jobs, request_cancel

POLL_SECONDS = 1.0
MAX_REQUEST_BYTES = 256 * 2**10
"""Limit on a request without its batch: names, options, metadata. Every list of jobs shows it again."""

_JOB_ID = re.compile(r"[0-9a-f]{32}")
_LONGEST_CURSOR = 200


def submit(
    resources: Resources,
    tenant: str,
    catalogue: CatalogueCache,
    request: JobRequest,
    idempotency_key: str | None,
    kind: JobKind = JobKind.ANALYSIS,
) -> tuple[Job, bool]:
    """Write the job and ring the bell; returns the job and whether it is new.

    Raises:
        ApiError: whatever the request lacks.
    """
    reference, inline = _batch_of(resources, request)
    new = _new_job(tenant, request.model_copy(update={"batch": reference}), idempotency_key, kind)
    # Before any check: what was accepted once stays accepted, whatever became of model, batch and catalogue since.
    found = find_by_key(resources.database, new)
    if found is None:
        check_request(catalogue.current(), request)
        get_artefact(resources, "models", request.model)
        if inline is None:
            get_artefact(resources, "batches", reference.sha256)
        else:
            store_small(resources, "batches", reference.sha256, inline)
        _check_further_uploads(resources, request)
        found = create_job(resources.database, new)
    if found.repeated:
        return _same(found, new), False
    announce(resources, found.job)
    return found.job, True


def _check_further_uploads(resources: Resources, request: JobRequest) -> None:
    """Whether the loss function, and the batches that options refer to, are there.

    Raises:
        ApiError: `loss_not_found`, `batch_not_found`; `param` names the field.
    """
    if isinstance(request.loss, LossReference):
        get_artefact(resources, "losses", request.loss.sha256)
    for place, extension in enumerate(request.extensions):
        for option, sha256 in extension.batches.items():
            get_artefact(resources, "batches", sha256, param=f"extensions.{place}.options.{option}")


def announce(resources: Resources, job: Job) -> None:
    """Tell followers and workers of a new job."""
    events.publish(resources.redis, events.state_event(job))
    broker.ring(resources.celery, job.id, job.priority)


def _new_job(tenant: str, request: JobRequest, idempotency_key: str | None, kind: JobKind) -> NewJob:
    text = request.model_dump_json()
    if len(text) > MAX_REQUEST_BYTES:
        raise ApiError(
            "payload_too_large",
            f"a request may have {MAX_REQUEST_BYTES} bytes without its batch; it has {len(text)}",
            param="metadata",
            remedy="shorten metadata, options and warnings",
        )
    told = text if kind == JobKind.ANALYSIS else f"{kind} {text}"  # one key serves one kind
    digest = hashlib.sha256(told.encode()).hexdigest()
    stored = request.model_dump(mode="json")
    return NewJob(
        stored,
        digest,
        idempotency_key,
        tenant=tenant,
        priority=request.priority,
        metadata=request.metadata,
        kind=kind,
    )


def _batch_of(resources: Resources, request: JobRequest) -> tuple[BatchReference, bytes | None]:
    """The batch by hash, and its bytes if they ride inside the request."""
    if isinstance(request.batch, BatchReference):
        return request.batch, None
    data = request.batch.data
    limit = resources.settings.inline_batch_bytes
    if len(data) > limit:
        raise inline_too_large(limit, f"{len(data)} bytes")
    return BatchReference(sha256=hashlib.sha256(data).hexdigest()), data


def inline_too_large(limit: int, came: str) -> ApiError:
    """The refusal of a batch too large to ride inside a request."""
    return ApiError(
        "payload_too_large",
        f"a batch inside the request may have {limit} bytes; {came} came",
        param="batch.data",
        remedy="PUT it to /v1/batches/{sha256} and refer to it by its hash",
    )


def _same(found: Created, new: NewJob) -> Job:
    if found.body_digest != new.body_digest:
        raise ApiError(
            "idempotency_conflict",
            f"the idempotency key {new.idempotency_key!r} was used with another body, for job {found.job.id}",
            param="Idempotency-Key",
            remedy="use a new key for a new request",
        )
    return found.job


async def find_job(resources: Resources, tenant: str | None, job_id: str) -> Job:
    """The tenant's job (None: anybody's).

    Raises:
        ApiError: `job_not_found`, also for a job of another tenant.
    """
    # Only an id of ours is looked up: PostgreSQL refuses some strings outright.
    known = _JOB_ID.fullmatch(job_id) is not None
    job = await run_in_threadpool(get_job, resources.database, job_id, tenant) if known else None
    if job is None:
        raise ApiError(
            "job_not_found", f"there is no job {job_id[:50]!r}", param="job_id", remedy="GET /v1/jobs lists the jobs"
        )
    return job


async def wait_for(resources: Resources, job: Job, seconds: float) -> Job:
    """The job when it is over, or as it is after `seconds`.

    The job's stream wakes us; the database, asked every second, is the truth.
    """
    deadline = time.monotonic() + seconds
    after = "0"
    while job.status not in FINAL and (left := deadline - time.monotonic()) > 0:
        try:
            async for event_id, event in events.follow(resources.async_redis, job.id, after, min(left, POLL_SECONDS)):
                after = event_id
                if event.status in FINAL or time.monotonic() >= deadline:  # progress may come without a pause
                    break
        except RedisError:
            await asyncio.sleep(min(left, POLL_SECONDS / 4))
        job = await find_job(resources, None, job.id)
    return job


async def with_result(resources: Resources, job: Job) -> Job:
    """The job with its result inside, if that is there and small."""
    if job.status != JobStatus.SUCCEEDED:
        return job
    return job.model_copy(update={"result": await run_in_threadpool(_read_small, resources, job)})


def _read_small(resources: Resources, job: Job) -> InlineResult | None:
    try:
        manifest = read_manifest(resources, job)
        if sum(group.file_bytes for group in manifest.groups) > resources.settings.inline_result_bytes:
            return None
        keys = {g.label: result_key(job.id, job.attempt, f"{g.label}.safetensors") for g in manifest.groups}
        files = {label: base64.b64encode(resources.objects.get_bytes(key)).decode() for label, key in keys.items()}
    except (ApiError, FileNotFoundError):  # an old result, removed; the job itself is still the answer
        return None
    return InlineResult(manifest=manifest, files=files)


async def cancel(resources: Resources, tenant: str, job_id: str) -> Job:
    """Ask a job to stop.

    Raises:
        ApiError: `job_not_found`, `job_finished`.
    """
    before = await find_job(resources, tenant, job_id)
    job = await run_in_threadpool(request_cancel, resources.database, job_id)
    assert job is not None
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise ApiError(
            "job_finished",
            f"job {job_id} has {job.status} already",
            param="job_id",
            remedy="there is nothing to cancel; GET the job for its result or error",
        )
    if job.status != before.status:
        await run_in_threadpool(events.publish, resources.redis, events.state_event(job))
    return job


async def page(
    resources: Resources, tenant: str, kind: JobKind, status: JobStatus | None, limit: int, cursor: str | None
) -> JobPage:
    """One page of a tenant's jobs of a kind, newest first."""
    before = None if cursor is None else _read_cursor(cursor)
    jobs = await run_in_threadpool(
        list_jobs, resources.database, tenant=tenant, kind=kind, status=status, limit=limit + 1, before=before
    )
    shown = jobs[:limit]
    return JobPage(items=tuple(shown), next_cursor=_write_cursor(shown[-1]) if len(jobs) > limit else None)


def _write_cursor(job: Job) -> str:
    return base64.urlsafe_b64encode(json.dumps([job.created_at.isoformat(), job.id]).encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        if len(cursor) > _LONGEST_CURSOR:
            raise ValueError("too long")
        moment, job_id = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        if not _JOB_ID.fullmatch(job_id):
            raise ValueError("no job id")
        return datetime.fromisoformat(moment).astimezone(UTC), job_id
    except (ValueError, TypeError, OverflowError) as error:
        raise ApiError(
            "invalid_request",
            f"the cursor {cursor[:50]!r} was not made by this server",
            param="cursor",
            remedy="pass next_cursor of the previous page, or none",
        ) from error
