"""`/v1/jobs`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.jobs import FINAL, Job, JobKind, JobPage, JobStatus
from curvature_protocol.requests import MOST_PARTS, JobRequest
from curvature_service import examples
from curvature_service.authentication import TenantDependency
from curvature_service.bodies import read_json
from curvature_service.jobs import service
from curvature_service.jobs.submission import MAX_REQUEST_BYTES, submit
from curvature_service.openapi import JobIdPath, answer, json_body, problems
from curvature_service.resources import ResourcesDependency

router = APIRouter(prefix="/jobs", tags=["jobs"])

_LONGEST_DATA_SET = 128 * MOST_PARTS
"""Of a part, its hash and its number of samples are told."""

Wait = Annotated[float, Query(ge=0, description="seconds to wait for the job's end, at most")]


async def read_job_request(request: Request, resources: ResourcesDependency) -> JobRequest:
    """The body, as large as a batch inside it may be (base64 makes four bytes of three)."""
    inline = resources.settings.inline_batch_bytes
    limit = max(4 * (inline // 3 + 1), _LONGEST_DATA_SET) + MAX_REQUEST_BYTES
    remedy = f"a batch of more than {inline} bytes goes to PUT /v1/batches/{{sha256}}; refer to it by its hash"
    return await read_json(request, JobRequest, limit, remedy)


@router.post(
    "",
    summary="Submit a job",
    description="Answers at once, or with `wait` when the job is over (a small result then comes inside).",
    status_code=201,
    responses={
        **answer(201, "Accepted", examples.JOB),
        **answer(200, "This idempotency key's job", examples.JOB, Job),
        **problems("model_not_found", "idempotency_conflict", "payload_too_large", "unknown_extension"),
    },
    openapi_extra=json_body(JobRequest, examples.JOB_REQUESTS),
)
async def submit_job(
    request: Request,
    response: Response,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    body: Annotated[JobRequest, Depends(read_job_request)],
    wait: Wait = 0.0,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="the same key and body: the same job")
    ] = None,
) -> Job:
    """Validate, write a row, ring the bell."""
    catalogue = request.app.state.catalogue
    job, new = await run_in_threadpool(submit, resources, tenant, catalogue, body, idempotency_key)
    response.status_code = 201 if new else 200
    if wait > 0:
        job = await service.wait_for(resources, job, min(wait, resources.settings.max_wait_seconds))
        job = await service.with_result(resources, job)
    return job


@router.get(
    "",
    summary="List jobs, newest first",
    responses={**answer(200, "One page", examples.JOB_PAGE), **problems("invalid_request")},
)
async def list_jobs(
    resources: ResourcesDependency,
    tenant: TenantDependency,
    kind: Annotated[JobKind, Query(description="only jobs of this kind")] = JobKind.ANALYSIS,
    status: Annotated[JobStatus | None, Query(description="only jobs in this state")] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="jobs in a page")] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the previous page")] = None,
) -> JobPage:
    """One page; `next_cursor` leads to the next, and is null in the last."""
    return await service.page(resources, tenant, kind, status, limit, cursor)


@router.get(
    "/{job_id}",
    summary="One job",
    responses={**answer(200, "The job", examples.JOB), **problems("job_not_found")},
)
async def get_job(job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency, wait: Wait = 0.0) -> Job:
    """State, progress, error, request."""
    job = await service.find_job(resources, tenant, job_id)
    if wait > 0 and job.status not in FINAL:
        job = await service.wait_for(resources, job, min(wait, resources.settings.max_wait_seconds))
    return job


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    responses={
        **answer(200, "The job, cancelled or cancelling", examples.CANCELLING_JOB),
        **problems("job_not_found", "job_finished"),
    },
)
async def cancel_job(job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Job:
    """A queued job is cancelled at once; a running one within two seconds."""
    return await service.cancel(resources, tenant, job_id)


@router.post(
    "/{job_id}/retry",
    summary="Queue a failed or cancelled job once more",
    description="Of a job over a data set, only the shards that have not succeeded are computed again.",
    responses={
        **answer(200, "The job, queued or waiting", examples.JOB),
        **problems("job_not_found", "job_not_finished", "queue_full"),
    },
)
async def retry_job(job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Job:
    """With all its attempts again."""
    return await service.take_up_again(resources, tenant, job_id)
