"""`DELETE` of jobs, sweeps and uploads, and `pin`."""

from fastapi import APIRouter, BackgroundTasks
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.artefacts import SINGULAR, Artefact, ArtefactKind
from curvature_protocol.jobs import Job
from curvature_service import examples
from curvature_service.artefacts.paths import Sha256Path
from curvature_service.authentication import TenantDependency
from curvature_service.openapi import JobIdPath, SweepIdPath, answer, problems
from curvature_service.resources import ResourcesDependency
from curvature_service.retention import service
from curvature_service.sweeps.service import find_sweep

router = APIRouter()


@router.delete(
    "/jobs/{job_id}",
    tags=["jobs"],
    summary="Delete a job",
    description="With its result, and a data set's shards. It must be over, and not pinned. Files that another job's "
    "result refers to (from the cache) stay as long as that is there.",
    status_code=204,
    responses={204: {"description": "It is gone"}, **problems("job_not_found", "job_not_finished")},
)
async def delete_job(job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> None:
    """Row, files, and its place in the cache."""
    await service.delete_job(resources, tenant, job_id)


@router.put(
    "/jobs/{job_id}/pin",
    tags=["jobs"],
    summary="Pin a job",
    description="Age and size limits leave it and its result alone, and it cannot be deleted.",
    responses={**answer(200, "The job", examples.JOB), **problems("job_not_found")},
)
async def pin_job(job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Job:
    """Repeating it does no harm."""
    return await service.pin_job(resources, tenant, job_id, pinned=True)


@router.delete(
    "/jobs/{job_id}/pin",
    tags=["jobs"],
    summary="Unpin a job",
    responses={**answer(200, "The job", examples.JOB), **problems("job_not_found")},
)
async def unpin_job(job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Job:
    """Repeating it does no harm."""
    return await service.pin_job(resources, tenant, job_id, pinned=False)


@router.delete(
    "/sweeps/{sweep_id}",
    tags=["sweeps"],
    summary="Delete a sweep with all of its jobs",
    description="All of them must be over, and none pinned; else none is deleted. Otherwise as for a job.",
    status_code=204,
    responses={204: {"description": "It is gone"}, **problems("sweep_not_found", "job_not_finished")},
)
async def delete_sweep(
    sweep_id: SweepIdPath, resources: ResourcesDependency, tenant: TenantDependency, background: BackgroundTasks
) -> None:
    """Rows at once, files afterwards."""
    sweep = await find_sweep(resources, tenant, sweep_id)
    await run_in_threadpool(service.delete_sweep, resources, tenant, sweep.id)
    background.add_task(service.clear_files, resources)


def add_retention(router: APIRouter, kind: ArtefactKind) -> None:
    """Add the endpoints of one kind of upload."""
    what, absent = SINGULAR[kind], f"{SINGULAR[kind]}_not_found"

    @router.delete(
        "/{sha256}",
        summary=f"Delete an uploaded {what}",
        description="Refused while a job that is not over needs it, while it is pinned, and where jobs of other "
        "tenants refer to it: uploads are known by their hash, and shared.",
        status_code=204,
        responses={204: {"description": "It is gone"}, **problems(absent, "in_use")},
    )
    async def delete(sha256: Sha256Path, resources: ResourcesDependency, tenant: TenantDependency) -> None:
        await run_in_threadpool(service.delete_artefact, resources, tenant, kind, sha256)

    @router.put(
        "/{sha256}/pin",
        summary=f"Pin an uploaded {what}",
        description="Age and size limits leave it alone, and it cannot be deleted.",
        responses={**answer(200, "Its record", examples.ARTEFACT[kind]), **problems(absent)},
    )
    async def pin(sha256: Sha256Path, resources: ResourcesDependency) -> Artefact:
        return await run_in_threadpool(service.pin_artefact, resources, kind, sha256, pinned=True)

    @router.delete(
        "/{sha256}/pin",
        summary=f"Unpin an uploaded {what}",
        description="Limits apply to it again. Repeating it does no harm.",
        responses={**answer(200, "Its record", examples.ARTEFACT[kind]), **problems(absent)},
    )
    async def unpin(sha256: Sha256Path, resources: ResourcesDependency) -> Artefact:
        return await run_in_threadpool(service.pin_artefact, resources, kind, sha256, pinned=False)
