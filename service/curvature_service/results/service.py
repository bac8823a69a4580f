"""Finding results."""

from datetime import UTC, datetime

from curvature_protocol.jobs import FINAL, Job, JobKind, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest, ResultGroup
from curvature_service.errors import ApiError
from curvature_service.resources import Resources
from curvature_state import manifests
from curvature_state.uses import USED_PRECISION_SECONDS, touch_result


def read_manifest(resources: Resources, job: Job) -> Manifest:
    """The manifest of a succeeded job.

    Raises:
        ApiError: `result_not_ready`, with what became of the job; `result_not_found` if it was removed.
    """
    if job.kind not in (JobKind.ANALYSIS, JobKind.SHARD):
        raise ApiError(
            "result_not_found",
            f"job {job.id} is of kind {job.kind}: it has no tensors",
            param="job_id",
            remedy=f"GET /v1/plans/{job.id}" if job.kind == JobKind.PLAN else "GET /v1/models/{sha256}",
        )
    if job.status != JobStatus.SUCCEEDED:
        raise _not_ready(job)
    _note_use(resources, job)
    try:
        return manifests.read_manifest(resources.objects, job.id, job.attempt)
    except FileNotFoundError as error:
        raise _removed(job) from error


def _note_use(resources: Resources, job: Job) -> None:
    """Uses are noted to the minute: a result that just came into being has been."""
    if job.finished_at is None or (datetime.now(UTC) - job.finished_at).total_seconds() > USED_PRECISION_SECONDS:
        touch_result(resources.database, job.id)


def find_file(resources: Resources, job: Job, label: str) -> tuple[str, int]:
    """(key, size in bytes) of a label's file.

    Raises:
        ApiError: `result_not_found`, naming the labels there are; and as `read_manifest`.
    """
    manifest = read_manifest(resources, job)
    sizes = {group.label: group.file_bytes for group in manifest.groups}
    if sizes.get(label) == 0:
        raise ApiError(
            "result_not_found",
            f"{label} of job {job.id} is kept in parts, by the shards of its data set",
            param="label",
            remedy=f"GET /v1/jobs/{job.id}/result names every tensor's parts",
        )
    if label not in sizes:
        raise ApiError(
            "result_not_found",
            f"job {job.id} has no result labelled {label!r}",
            param="label",
            remedy=f"its labels: {', '.join(sizes)}",
        )
    key = file_key(job, next(group for group in manifest.groups if group.label == label))
    if resources.objects.head(key) != sizes[label]:
        raise _removed(job)
    return key, sizes[label]


def file_key(job: Job, group: ResultGroup) -> str:
    """Where a group's file is stored: with this job's result, or with that of the job that computed it."""
    if group.source is None:
        return result_key(job.id, job.attempt, f"{group.label}.safetensors")
    source = group.source
    return result_key(source.job_id, source.attempt, f"{source.label}.safetensors")


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
