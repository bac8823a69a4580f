"""Finding results."""

from curvature_protocol.jobs import FINAL, Job, JobKind, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest
from curvature_service.errors import ApiError
from curvature_service.resources import Resources


def read_manifest(resources: Resources, job: Job) -> Manifest:
    """The manifest of a succeeded job.

    Raises:
        ApiError: `result_not_ready`, with what became of the job; `result_not_found` if it was removed.
    """
    if job.kind != JobKind.ANALYSIS:
        raise ApiError(
            "result_not_found",
            f"job {job.id} is of kind {job.kind}: it has no tensors",
            param="job_id",
            remedy=f"GET /v1/plans/{job.id}" if job.kind == JobKind.PLAN else "GET /v1/models/{sha256}",
        )
    if job.status != JobStatus.SUCCEEDED:
        raise _not_ready(job)
    try:
        data = resources.objects.get_bytes(result_key(job.id, job.attempt, "manifest.json"))
    except FileNotFoundError as error:
        raise _removed(job) from error
    return Manifest.model_validate_json(data)


def find_file(resources: Resources, job: Job, label: str) -> int:
    """The size in bytes of a label's file.

    Raises:
        ApiError: `result_not_found`, naming the labels there are; and as `read_manifest`.
    """
    manifest = read_manifest(resources, job)
    sizes = {group.label: group.file_bytes for group in manifest.groups}
    if label not in sizes:
        raise ApiError(
            "result_not_found",
            f"job {job.id} has no result labelled {label!r}",
            param="label",
            remedy=f"its labels: {', '.join(sizes)}",
        )
    if resources.objects.head(result_key(job.id, job.attempt, f"{label}.safetensors")) != sizes[label]:
        raise _removed(job)
    return sizes[label]


def _not_ready(job: Job) -> ApiError:
    if job.status not in FINAL:
        why, remedy = f"job {job.id} is {job.status}", f"wait for it, e.g. on /v1/jobs/{job.id}/events"
    elif job.error is None:
        why, remedy = f"job {job.id} was {job.status}", "submit it again"
    else:
        why = f"job {job.id} failed: {job.error.code}: {job.error.detail}"
        remedy = job.error.remedy or "submit it again"
    return ApiError("result_not_ready", f"there is no result: {why}", param="job_id", remedy=remedy)


def _removed(job: Job) -> ApiError:
    return ApiError(
        "result_not_found", f"the result of job {job.id} was removed", param="job_id", remedy="submit it again"
    )
