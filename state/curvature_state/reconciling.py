"""What makes leases and bells trustworthy: jobs are taken from silent workers, and lost bells are rung again."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import or_, select

from curvature_state.database import Database
from curvature_state.endings import MAX_ATTEMPTS, Ending, take_back
from curvature_state.tables import JobRow
from curvature_state.tenants import QUEUED
from curvature_state.turns import HELD


@dataclass(frozen=True)
class Unheard:
    """Queued jobs by what they require: one bell of a kind wakes all workers that hear it."""

    job_id: str
    gpu: bool
    tag: str | None


def take_back_expired(database: Database, max_attempts: int = MAX_ATTEMPTS) -> list[Ending]:
    """Take jobs from workers that fell silent."""
    expired = select(JobRow.id).where(JobRow.status.in_(HELD), JobRow.lease_expires_at < datetime.now(UTC))
    with database.read() as session:
        ids = session.scalars(expired.order_by(JobRow.id)).all()
    endings = (take_back(database, job_id, max_attempts) for job_id in ids)
    return [ending for ending in endings if ending is not None]


def find_waiting(database: Database) -> list[Unheard]:
    """One queued job of each kind of requirement that might be taken up now."""
    ready = or_(JobRow.not_before.is_(None), JobRow.not_before <= datetime.now(UTC))
    kinds = select(JobRow.requires_gpu, JobRow.requires_tag).where(QUEUED, ready).distinct()
    with database.read() as session:
        found = []
        for gpu, tag in session.execute(kinds).all():
            of_kind = JobRow.requires_tag.is_(None) if tag is None else JobRow.requires_tag == tag
            oldest = select(JobRow.id).where(QUEUED, ready, JobRow.requires_gpu.is_(gpu), of_kind).limit(1)
            if (job_id := session.scalar(oldest)) is not None:
                found.append(Unheard(job_id, gpu, tag))
        return found
