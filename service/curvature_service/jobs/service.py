"""Waiting for, listing, cancelling and retrying jobs."""

import asyncio
import base64
import re
import time

from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from curvature_protocol.jobs import FINAL, InlineResult, Job, JobKind, JobPage, JobStatus
from curvature_service.cursors import cursor_after, read_cursor
from curvature_service.errors import ApiError
from curvature_service.jobs.submission import announce, full, missing
from curvature_service.resources import Resources
from curvature_service.results.service import file_key, read_manifest
from curvature_state import events
from curvature_state.artefacts import ArtefactMissing
from curvature_state.endings import request_cancel, retry
from curvature_state.jobs import get_job, list_jobs
from curvature_state.tenants import QueueFull

POLL_SECONDS = 1.0

_JOB_ID = re.compile(r"[0-9a-f]{32}")


async def find_job(resources: Resources, tenant: str | None, job_id: str) -> Job:
    """The tenant's job (None: anybody's).

    Raises:
        ApiError: `job_not_found`, also for a job of another tenant.
    """
    # Only an id of ours is looked up: PostgreSQL refuses some strings outright.
    known = _JOB_ID.fullmatch(job_id) is not None
    job = await run_in_threadpool(get_job, resources.database, job_id, tenant) if known else None
    if job is None:
        raise unknown(job_id)
    return job


def unknown(job_id: str) -> ApiError:
    """The refusal of an id that no job has."""
    return ApiError(
        "job_not_found", f"there is no job {job_id[:50]!r}", param="job_id", remedy="GET /v1/jobs lists the jobs"
    )


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
        if any(tensor.parts for group in manifest.groups for tensor in group.tensors):
            return None
        if sum(group.file_bytes for group in manifest.groups) > resources.settings.inline_result_bytes:
            return None
        keys = {group.label: file_key(job, group) for group in manifest.groups}
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
    ending = await run_in_threadpool(request_cancel, resources.database, job_id)
    if ending is None:
        raise unknown(job_id)
    job = ending.job
    if job.status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
        raise ApiError(
            "job_finished",
            f"job {job_id} has {job.status} already",
            param="job_id",
            remedy="there is nothing to cancel; GET the job for its result or error",
        )
    if job.status != before.status:
        await run_in_threadpool(events.publish_all, resources.redis, (job, *ending.others))
    return job


async def take_up_again(resources: Resources, tenant: str, job_id: str) -> Job:
    """Queue a failed or cancelled job once more; of one over a data set, what has not succeeded.

    Raises:
        ApiError: `job_not_found`, `job_finished` if it has succeeded, `job_not_finished`, `queue_full`; and for an
            upload that it needs and that was removed.
    """
    before = await find_job(resources, tenant, job_id)
    if before.status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        over = before.status in FINAL
        raise ApiError(
            "job_finished" if over else "job_not_finished",
            f"job {job_id} {'has' if over else 'is'} {before.status}; only a failed or cancelled job is retried",
            param="job_id",
            remedy="GET its result" if over else "wait for its end, or cancel it",
        )
    try:
        ending = await run_in_threadpool(retry, resources.database, job_id)
    except QueueFull as error:
        raise full(error) from error
    except ArtefactMissing as error:
        raise missing(error) from error
    if ending is None:
        raise unknown(job_id)
    await run_in_threadpool(announce, resources, ending.job, len(ending.others) or None)
    return ending.job


async def page(
    resources: Resources, tenant: str, kind: JobKind, status: JobStatus | None, limit: int, cursor: str | None
) -> JobPage:
    """One page of a tenant's jobs of a kind, newest first."""
    before = None if cursor is None else read_cursor(cursor)
    jobs = await run_in_threadpool(
        list_jobs, resources.database, tenant=tenant, kind=kind, status=status, limit=limit + 1, before=before
    )
    shown = jobs[:limit]
    return JobPage(items=tuple(shown), next_cursor=cursor_after(shown, len(jobs)))
