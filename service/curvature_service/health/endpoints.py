"""`/v1/health` and `/v1/ready`."""

from importlib.metadata import version

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.health import Health, Readiness
from curvature_service.health.service import check_readiness
from curvature_service.resources import ResourcesDependency
from curvature_state.workers import list_workers

router = APIRouter(tags=["health"])


@router.get("/health", summary="The process answers; its workers, isolation and limits")
async def health(resources: ResourcesDependency) -> Health:
    """Cheap, and without a key."""
    settings = resources.settings
    workers = await run_in_threadpool(list_workers, resources.database)
    return Health(
        version=version("curvature"),
        workers=tuple(workers),
        limits={
            "upload_bytes": settings.max_upload_bytes,
            "inline_batch_bytes": settings.inline_batch_bytes,
            "inline_result_bytes": settings.inline_result_bytes,
            "wait_seconds": settings.max_wait_seconds,
        },
    )


@router.get(
    "/ready",
    summary="Whether everything the server needs answers",
    responses={503: {"model": Readiness, "description": "Something does not"}},
)
async def ready(resources: ResourcesDependency, response: Response) -> Readiness:
    """Database, storage, broker, worker."""
    readiness = await run_in_threadpool(check_readiness, resources)
    response.status_code = 200 if readiness.ready else 503
    return readiness
