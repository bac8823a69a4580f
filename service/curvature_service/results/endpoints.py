"""`/v1/jobs/{id}/result`."""

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest
from curvature_service.jobs.service import find_job
from curvature_service.openapi import problems
from curvature_service.ranges import stream_object
from curvature_service.resources import ResourcesDependency
from curvature_service.results.service import find_group, read_manifest

router = APIRouter(prefix="/jobs/{job_id}/result", tags=["results"])


@router.get("", summary="The manifest of a result", responses=problems(404, 409))
async def get_result(job_id: str, resources: ResourcesDependency) -> Manifest:
    """Every tensor's name, shape, dtype, byte range, convention and provenance."""
    job = await find_job(resources, job_id)
    return await run_in_threadpool(read_manifest, resources, job)


@router.head("/{label}.safetensors", include_in_schema=False)
@router.get(
    "/{label}.safetensors",
    summary="The tensors of one label",
    description="A safetensors file. Single HTTP ranges are honoured; the manifest says where each tensor lies.",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "The range asked for"},
        **problems(404, 409, 416),
    },
)
async def get_file(job_id: str, label: str, request: Request, resources: ResourcesDependency) -> Response:
    """Stream the file, or a part of it."""
    job = await find_job(resources, job_id)
    manifest = await run_in_threadpool(read_manifest, resources, job)
    group = find_group(manifest, label)
    return stream_object(
        request,
        resources.objects,
        result_key(job.id, job.attempt, f"{label}.safetensors"),
        group.file_bytes,
        etag=f"{job.id}-{job.attempt}-{label}",
        media_type="application/octet-stream",
    )
