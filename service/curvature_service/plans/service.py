"""Plans: jobs of a kind of their own, and what they found."""

from curvature_protocol.jobs import Job, JobKind, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.plans import Plan, PlanJob
from curvature_service.errors import ApiError
from curvature_service.jobs.service import find_job
from curvature_service.resources import Resources
from curvature_state.uses import touch_result


async def find_plan(resources: Resources, tenant: str, job_id: str) -> Job:
    """The tenant's job that plans.

    Raises:
        ApiError: `job_not_found`, also for a job of another kind.
    """
    job = await find_job(resources, tenant, job_id)
    if job.kind != JobKind.PLAN:
        raise ApiError(
            "job_not_found",
            f"job {job_id} is of kind {job.kind}: it is no plan",
            param="job_id",
            remedy="GET /v1/jobs?kind=plan lists the plans",
        )
    return job


def with_plan(resources: Resources, job: Job) -> PlanJob:
    """The job with its plan, if it has succeeded.

    Raises:
        ApiError: `result_not_found` if the plan was removed.
    """
    plan = None
    if job.status == JobStatus.SUCCEEDED:
        touch_result(resources.database, job.id)
        try:
            plan = Plan.model_validate_json(resources.objects.get_bytes(result_key(job.id, job.attempt, "plan.json")))
        except FileNotFoundError as error:
            raise ApiError(
                "result_not_found", f"the plan of job {job.id} was removed", param="job_id", remedy="ask for it again"
            ) from error
    return PlanJob.model_validate({**dict(job), "plan": plan})
