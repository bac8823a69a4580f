"""`/v1/jobs`."""

from typing import Annotated

from fastapi import APIRouter, Body, Header, Query, Request, Response

from curvature_protocol.jobs import FINAL, Job, JobPage, JobStatus
from curvature_protocol.requests import JobRequest
from curvature_service.jobs import service
from curvature_service.openapi import problems
from curvature_service.resources import ResourcesDependency

router = APIRouter(prefix="/jobs", tags=["jobs"])

_EXAMPLES = {
    "uploaded batch": {
        "summary": "A model and a batch uploaded before, two extensions",
        "value": {
            "model": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "batch": {"sha256": "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"},
            "extensions": ["variance", {"name": "kfac", "label": "kfac4", "options": {"mc_samples": 4}}],
            "loss": "cross_entropy",
            "reduction": "mean",
            "seed": 0,
        },
    },
    "batch inside": {
        "summary": "A small batch riding inside the request (with ?wait=30: one round trip)",
        "value": {
            "model": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "batch": {"data": "QAAAAAAAAAB7Il9f…"},
            "extensions": ["diag_ggn_mc"],
        },
    },
}


@router.post(
    "",
    summary="Submit a job",
    description="Answers at once, or with `wait` when the job is over (a small result then comes inside).",
    status_code=201,
    responses={200: {"model": Job, "description": "This idempotency key's job"}, **problems(404, 409, 413)},
)
async def submit_job(
    request: Request,
    response: Response,
    resources: ResourcesDependency,
    body: Annotated[JobRequest, Body(openapi_examples=_EXAMPLES)],
    wait: Annotated[float, Query(ge=0, description="seconds to wait for the job's end")] = 0.0,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> Job:
    """Validate, write a row, ring the bell."""
    job, new = await service.submit(resources, request.app.state.catalogue, body, idempotency_key)
    response.status_code = 201 if new else 200
    if wait > 0:
        job = await service.wait_for(resources, job, min(wait, resources.settings.max_wait_seconds))
        job = await service.with_result(resources, job)
    return job


@router.get("", summary="List jobs, newest first", responses=problems())
async def list_jobs(
    resources: ResourcesDependency,
    status: Annotated[JobStatus | None, Query(description="only jobs in this state")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the previous page")] = None,
) -> JobPage:
    """One page."""
    return await service.page(resources, status, limit, cursor)


@router.get("/{job_id}", summary="One job", responses=problems(404))
async def get_job(
    job_id: str,
    resources: ResourcesDependency,
    wait: Annotated[float, Query(ge=0, description="seconds to wait for the job's end")] = 0.0,
) -> Job:
    """State, progress, error, request."""
    job = await service.find_job(resources, job_id)
    if wait > 0 and job.status not in FINAL:
        job = await service.wait_for(resources, job, min(wait, resources.settings.max_wait_seconds))
    return job


@router.post("/{job_id}/cancel", summary="Cancel a job", responses=problems(404, 409))
async def cancel_job(job_id: str, resources: ResourcesDependency) -> Job:
    """A queued job is cancelled at once; a running one within two seconds."""
    return await service.cancel(resources, job_id)
