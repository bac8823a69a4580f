"""While a worker holds a job: each step one transaction and a compare-and-set on (status, attempt).

A step that ends an attempt is true once more for whoever repeats it: a commit may take effect and its acknowledgement
be lost. An attempt's number is never used again, so that an earlier holder's word never counts as a later one's.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, select, update
from sqlalchemy.orm import Session

from curvature_protocol.jobs import JobStatus, Progress
from curvature_state.database import Database
from curvature_state.tables import JobRow
from curvature_state.turns import HELD


def renew(
    database: Database, job_id: str, attempt: int, lease_seconds: float, progress: Progress | None
) -> JobStatus | None:
    """Prolong the lease and note progress. None: the lease is lost; CANCELLING: the job is to stop."""
    values: dict[str, Any] = {"lease_expires_at": datetime.now(UTC) + timedelta(seconds=lease_seconds)}
    if progress is not None:
        values["progress"] = progress.model_dump()
    with database.write() as session:
        if not set_held(session, job_id, HELD, attempt, **values):
            return None
        return JobStatus(session.execute(select(JobRow.status).where(JobRow.id == job_id)).scalar_one())


def peek(database: Database, job_id: str, attempt: int) -> JobStatus | None:
    """The job's status as the holder of `attempt` sees it; None: the lease is lost."""
    with database.read() as session:
        found = session.execute(select(JobRow.status, JobRow.attempt).where(JobRow.id == job_id)).one_or_none()
    if found is None or found.attempt != attempt or found.status not in HELD:
        return None
    return JobStatus(found.status)


def release(database: Database, job_id: str, attempt: int, requires_bytes: int = 0) -> bool:
    """Running → queued, not counted as a failed attempt; False if the lease was lost.

    A stopping worker hands its job back; so does one that is too small, which has learned what the job requires.
    """
    learned = {"requires_bytes": requires_bytes} if requires_bytes else {}
    with database.write() as session:
        released = set_held(
            session,
            job_id,
            [JobStatus.RUNNING],
            attempt,
            status=JobStatus.QUEUED,
            handed_back=JobRow.handed_back + 1,
            lease_owner=None,
            lease_expires_at=None,
            progress=None,
            **learned,
        )
        return released or stands(session, job_id, JobStatus.QUEUED, attempt)


def set_held(session: Session, job_id: str, statuses: Sequence[JobStatus], attempt: int, /, **values: Any) -> bool:
    """Compare and set: change the row if it is in one of `statuses`, at this attempt."""
    query = update(JobRow).where(JobRow.id == job_id, JobRow.status.in_(statuses), JobRow.attempt == attempt)
    result = session.execute(query.values(**values).execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return bool(result.rowcount == 1)


def stands(session: Session, job_id: str, status: JobStatus, attempt: int) -> bool:
    """Whether the job is in that very state already."""
    query = select(JobRow.id).where(JobRow.id == job_id, JobRow.status == status, JobRow.attempt == attempt)
    return session.scalar(query) is not None
