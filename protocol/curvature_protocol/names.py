"""Names that two parts must agree on: tasks, queues, streams, stored keys, tensors in a batch file."""

RUN_JOB_TASK = "curvature.run_job"
"""Celery task; its only argument is a job's id. It wakes a worker, which takes up whatever job's turn it is."""

QUEUE = "curvature"

INPUTS = "inputs"
"""A batch file holds `inputs` (one tensor), or `inputs.0`, `inputs.1`, … (positional), or `inputs.{name}` (by
name), and `targets`."""

TARGETS = "targets"

UPLOADS = "uploads"
"""Object-store prefix of uploads on their way."""

ADMITTED, RESULTS = "admitted", "results"
"""Object-store prefixes of what workers store."""


def bell_queue(*, gpu: bool = False, tag: str | None = None) -> str:
    """The Celery queue whose workers can do jobs with these requirements."""
    if tag is not None:
        return f"{QUEUE}.tag.{tag}"
    return f"{QUEUE}.gpu" if gpu else QUEUE


def worker_queue(worker_id: str) -> str:
    """The Celery queue of one worker alone."""
    return f"{QUEUE}.worker.{worker_id}"


def event_stream(job_id: str) -> str:
    """Redis stream of a job's or a sweep's events; each entry has one field `event`, a `JobEvent` as JSON."""
    return f"curvature:events:{job_id}"


def artefact_key(kind: str, sha256: str) -> str:
    """Object-store key of an upload."""
    return f"{kind}/{sha256}"


def upload_key(upload_id: str) -> str:
    """Object-store key of an upload whose bytes are not known to be right yet; its parts lie below it."""
    return f"{UPLOADS}/{upload_id}"


def upload_part_key(upload_id: str, number: int) -> str:
    """Object-store key of one part of an upload that comes through the API."""
    return f"{UPLOADS}/{upload_id}/{number}"


def admitted_key(sha256: str, admission_version: str) -> str:
    """Object-store key of a model that admission accepted and repacked."""
    return f"{ADMITTED}/{sha256}/{admission_version}"


def result_prefix(job_id: str, attempt: int | None = None) -> str:
    """What the object-store keys of a job's results begin with, or those of one attempt."""
    return f"{RESULTS}/{job_id}" if attempt is None else f"{RESULTS}/{job_id}/{attempt}"


def result_key(job_id: str, attempt: int, file_name: str) -> str:
    """Object-store key of one file of a result (`manifest.json`, `{label}.safetensors`, or `{kind}.json`)."""
    return f"{result_prefix(job_id, attempt)}/{file_name}"
