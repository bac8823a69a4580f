"""Submitting, waiting for, and cancelling jobs."""

import asyncio
import base64
import hashlib
import json
import time
from collections.abc import AsyncIterator
from datetime import datetime

from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from curvature_protocol.jobs import FINAL, InlineResult, Job, JobPage, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.requests import BatchReference, JobRequest
from curvature_service.artefacts.service import get_artefact, store_upload
from curvature_service.errors import ApiError
from curvature_service.extensions.service import CatalogueCache, check_request
from curvature_service.resources import Resources
from curvature_service.results.service import read_manifest
from curvature_state import broker, events
from curvature_state.artefacts import find_artefact
from curvature_state.jobs import NewJob, create_job, get_job, list_jobs, request_cancel

POLL_SECONDS = 1.0


async def submit(
    resources: Resources, catalogue: CatalogueCache, request: JobRequest, idempotency_key: str | None
) -> tuple[Job, bool]:
    """Write the job and ring the bell; returns the job and whether it is new."""
    check_request(await run_in_threadpool(catalogue.current), request)
    digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    await get_artefact(resources, "models", request.model)
    reference = await _settle_batch(resources, request)
    stored = request.model_copy(update={"batch": reference}).model_dump(mode="json")
    new = NewJob(stored, digest, idempotency_key, "default", request.priority, request.metadata)
    created = await run_in_threadpool(create_job, resources.database, new)
    if created.repeated and created.body_digest != digest:
        raise ApiError(
            "idempotency_conflict",
            f"the idempotency key {idempotency_key!r} was used with another body",
            param="Idempotency-Key",
            remedy="use a new key for a new request",
        )
    if not created.repeated:
        await run_in_threadpool(broker.ring, resources.celery, created.job.id)
    return created.job, not created.repeated


async def _settle_batch(resources: Resources, request: JobRequest) -> BatchReference:
    """The batch by hash: looked up, or stored if it rode inside the request."""
    if isinstance(request.batch, BatchReference):
        await get_artefact(resources, "batches", request.batch.sha256)
        return request.batch
    data = request.batch.data
    limit = resources.settings.inline_batch_bytes
    if len(data) > limit:
        raise ApiError(
            "payload_too_large",
            f"a batch inside the request may have {limit} bytes; {len(data)} came",
            param="batch.data",
            remedy="upload it to /v1/batches and refer to it by its hash",
        )
    sha256 = hashlib.sha256(data).hexdigest()
    if await run_in_threadpool(find_artefact, resources.database, "batches", sha256) is None:
        await store_upload(resources, "batches", sha256, _once(data))
    return BatchReference(sha256=sha256)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def find_job(resources: Resources, job_id: str) -> Job:
    """The job.

    Raises:
        ApiError: `job_not_found`.
    """
    job = await run_in_threadpool(get_job, resources.database, job_id)
    if job is None:
        raise ApiError(
            "job_not_found", f"there is no job {job_id!r}", param="job_id", remedy="GET /v1/jobs lists the jobs"
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
                if event.status in FINAL:
                    break
        except RedisError:
            await asyncio.sleep(min(left, POLL_SECONDS / 4))
        job = await find_job(resources, job.id)
    return job


async def with_result(resources: Resources, job: Job) -> Job:
    """The job with its result inside, if that is there and small."""
    if job.status != JobStatus.SUCCEEDED:
        return job
    manifest = await run_in_threadpool(read_manifest, resources, job)
    if sum(group.file_bytes for group in manifest.groups) > resources.settings.inline_result_bytes:
        return job

    def read() -> dict[str, str]:
        keys = {g.label: result_key(job.id, job.attempt, f"{g.label}.safetensors") for g in manifest.groups}
        return {label: base64.b64encode(resources.objects.get_bytes(key)).decode() for label, key in keys.items()}

    return job.model_copy(update={"result": InlineResult(manifest=manifest, files=await run_in_threadpool(read))})


async def cancel(resources: Resources, job_id: str) -> Job:
    """Ask a job to stop.

    Raises:
        ApiError: `job_not_found`, `job_finished`.
    """
    await find_job(resources, job_id)
    job = await run_in_threadpool(request_cancel, resources.database, job_id)
    assert job is not None
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise ApiError("job_finished", f"job {job_id} has {job.status} already", param="job_id")
    await run_in_threadpool(events.publish, resources.redis, events.state_event(job))
    return job


async def page(resources: Resources, status: JobStatus | None, limit: int, cursor: str | None) -> JobPage:
    """One page of jobs, newest first."""
    before = None if cursor is None else _read_cursor(cursor)
    jobs = await run_in_threadpool(list_jobs, resources.database, status=status, limit=limit + 1, before=before)
    shown = jobs[:limit]
    return JobPage(items=tuple(shown), next_cursor=_write_cursor(shown[-1]) if len(jobs) > limit else None)


def _write_cursor(job: Job) -> str:
    return base64.urlsafe_b64encode(json.dumps([job.created_at.isoformat(), job.id]).encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        moment, job_id = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return datetime.fromisoformat(moment), str(job_id)
    except (ValueError, TypeError) as error:
        raise ApiError(
            "invalid_request",
            f"the cursor {cursor[:50]!r} was not made by this server",
            param="cursor",
            remedy="pass next_cursor of the previous page, or none",
        ) from error
