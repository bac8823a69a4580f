"""`/v1/health` and `/v1/ready`."""

from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.health import Health, Readiness
from curvature_service import examples
from curvature_service.health.service import check_readiness, known_workers
from curvature_service.openapi import answer, problems
from curvature_service.resources import ResourcesDependency

router = APIRouter(tags=["health"])


@router.get(
    "/health",
    summary="The process answers; its workers, isolation and limits",
    responses=answer(200, "It does", examples.HEALTH),
)
async def health(resources: ResourcesDependency) -> Health:
    """Cheap, without a key, and 200 as long as the process lives: `/v1/ready` says whether its parts do."""
    settings = resources.settings
    workers = await run_in_threadpool(known_workers, resources)
    return Health(
        version=version("curvature"),
        workers=workers,
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
    responses={
        **answer(200, "Everything answers", examples.READY),
        **answer(503, "Something does not; `checks` says what", examples.NOT_READY, Readiness),
        422: problems()[422],
    },
)
async def ready(
    resources: ResourcesDependency,
    response: Response,
    worker: Annotated[
        bool,
        Query(description="false leaves workers out: for load balancers, where workers are started when jobs wait"),
    ] = True,
) -> Readiness:
    """Database, storage, broker, worker."""
    readiness = await run_in_threadpool(check_readiness, resources, with_worker=worker)
    response.status_code = 200 if readiness.ready else 503
    return readiness
