"""`/v1/jobs/{id}/result`."""

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.results import Manifest
from curvature_service import examples
from curvature_service.authentication import TenantDependency
from curvature_service.delivery import Direct, deliver_object
from curvature_service.jobs.service import find_job
from curvature_service.openapi import BYTES, RANGE_HEADER, REDIRECT, JobIdPath, answer, problems
from curvature_service.resources import ResourcesDependency
from curvature_service.results.service import find_file, read_manifest

router = APIRouter(prefix="/jobs/{job_id}/result", tags=["results"])


@router.get(
    "",
    summary="The manifest of a result",
    responses={**answer(200, "The manifest", examples.MANIFEST), **problems("job_not_found", "result_not_ready")},
)
async def get_result(job_id: JobIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Manifest:
    """Every tensor's name, shape, dtype, byte range, convention and provenance."""
    job = await find_job(resources, tenant, job_id)
    return await run_in_threadpool(read_manifest, resources, job)


@router.head(
    "/{label}.safetensors",
    summary="Size of the tensors of one label",
    description="The headers of the GET.",
    response_class=Response,
    responses={
        200: {"description": "Content-Length, ETag, Accept-Ranges"},
        **problems("result_not_found", "result_not_ready"),
    },
)
@router.get(
    "/{label}.safetensors",
    summary="The tensors of one label",
    description="A safetensors file. Single HTTP ranges are honoured; the manifest says where each tensor lies.",
    response_class=Response,
    responses={
        200: {"description": "The whole file", "content": BYTES},
        206: {"description": "The range asked for", "content": BYTES},
        **REDIRECT,
        **problems("result_not_found", "result_not_ready", "range_not_satisfiable"),
    },
    openapi_extra=RANGE_HEADER,
)
async def get_file(
    job_id: JobIdPath,
    label: str,
    request: Request,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    direct: Direct = False,
) -> Response:
    """Stream the file, or a part of it."""
    job = await find_job(resources, tenant, job_id)
    key, size = await run_in_threadpool(find_file, resources, job, label)
    etag = f"{job.id}-{job.attempt}-{label}"
    return await deliver_object(request, resources, key, size, etag=etag, direct=direct)
