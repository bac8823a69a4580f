"""`/v1/plans`."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.jobs import FINAL, JobKind
from curvature_protocol.plans import PlanJob
from curvature_protocol.requests import JobRequest
from curvature_service import examples
from curvature_service.authentication import TenantDependency
from curvature_service.jobs import service as jobs_service
from curvature_service.jobs.endpoints import Wait, read_job_request
from curvature_service.jobs.submission import submit
from curvature_service.openapi import JobIdPath, answer, json_body, problems
from curvature_service.plans.service import find_plan, with_plan
from curvature_service.resources import ResourcesDependency

router = APIRouter(prefix="/plans", tags=["plans"])


@router.post(
    "",
    summary="Plan a job",
    description="The body of a job; answers what it would do (method, cost and memory per parameter), at once or with "
    "`wait` when that is known. A worker finds it by a forward pass; nothing is computed. A data set's plan is that of "
    "its largest part. It is a job of kind `plan`: `/v1/jobs/{job_id}` cancels it and tells its events.",
    status_code=201,
    responses={
        **answer(201, "Accepted, and the plan if it was found in time", examples.PLAN_JOB),
        **answer(200, "This idempotency key's plan", examples.PLAN_JOB, PlanJob),
        **problems(
            "model_not_found", "idempotency_conflict", "payload_too_large", "unknown_extension", "result_not_found"
        ),
    },
    openapi_extra=json_body(JobRequest, examples.JOB_REQUESTS),
)
async def make_plan(
    request: Request,
    response: Response,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    body: Annotated[JobRequest, Depends(read_job_request)],
    wait: Wait = 0.0,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="the same key and body: the same plan")
    ] = None,
) -> PlanJob:
    """Validate, write a row, ring the bell, wait."""
    catalogue = request.app.state.catalogue
    job, new = await run_in_threadpool(submit, resources, tenant, catalogue, body, idempotency_key, JobKind.PLAN)
    response.status_code = 201 if new else 200
    if wait > 0:
        job = await jobs_service.wait_for(resources, job, min(wait, resources.settings.max_wait_seconds))
    return await run_in_threadpool(with_plan, resources, job)


@router.get(
    "/{job_id}",
    summary="One plan",
    responses={**answer(200, "The plan", examples.PLAN_JOB), **problems("job_not_found")},
)
async def get_plan(
    job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency, wait: Wait = 0.0
) -> PlanJob:
    """State, error, and the plan once it has succeeded."""
    job = await find_plan(resources, tenant, job_id)
    if wait > 0 and job.status not in FINAL:
        job = await jobs_service.wait_for(resources, job, min(wait, resources.settings.max_wait_seconds))
    return await run_in_threadpool(with_plan, resources, job)
