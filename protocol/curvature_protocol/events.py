"""Server-sent events of one job: `event: state` and `event: progress`, data = `JobEvent` as JSON."""

from datetime import datetime
from typing import Literal

from curvature_protocol.base import Reply
from curvature_protocol.errors import Problem
from curvature_protocol.jobs import JobStatus, Progress


class JobEvent(Reply):
    """One thing that happened to a job. The last event of every job has a final `status`."""

    event: Literal["state", "progress"]
    job_id: str
    status: JobStatus
    at: datetime
    attempt: int = 0
    progress: Progress | None = None
    error: Problem | None = None
    sweep: str | None = None
