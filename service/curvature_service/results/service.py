"""Finding results."""

from curvature_protocol.jobs import FINAL, Job, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest, ResultGroup
from curvature_service.errors import ApiError
from curvature_service.resources import Resources


def read_manifest(resources: Resources, job: Job) -> Manifest:
    """The manifest of a succeeded job.

    Raises:
        ApiError: `result_not_ready`, with what became of the job.
    """
    if job.status != JobStatus.SUCCEEDED:
        if job.status in FINAL:
            why = f"job {job.id} was {job.status}" if job.error is None else f"job {job.id} failed: {job.error.detail}"
            remedy = "submit it again" if job.error is None else job.error.remedy
        else:
            why, remedy = f"job {job.id} is {job.status}", "wait for it, e.g. on /v1/jobs/{job_id}/events"
        raise ApiError("result_not_ready", f"there is no result: {why}", param="job_id", remedy=remedy)
    try:
        data = resources.objects.get_bytes(result_key(job.id, job.attempt, "manifest.json"))
    except FileNotFoundError as error:
        raise ApiError(
            "result_not_found", f"the result of job {job.id} was removed", param="job_id", remedy="submit it again"
        ) from error
    return Manifest.model_validate_json(data)


def find_group(manifest: Manifest, label: str) -> ResultGroup:
    """The group of a label.

    Raises:
        ApiError: `result_not_found`, naming the labels there are.
    """
    for group in manifest.groups:
        if group.label == label:
            return group
    raise ApiError(
        "result_not_found",
        f"job {manifest.job_id} has no result labelled {label!r}",
        param="label",
        remedy=f"its labels: {', '.join(g.label for g in manifest.groups)}",
    )
