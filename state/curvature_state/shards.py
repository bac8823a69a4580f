"""The shards of a job over a data set."""

from dataclasses import dataclass

from sqlalchemy import select

from curvature_protocol.jobs import JobStatus
from curvature_state.database import Database
from curvature_state.tables import JobRow


@dataclass(frozen=True)
class Shard:
    """Where one part of a data set stands."""

    id: str
    part: int
    attempt: int
    status: JobStatus


def list_shards(database: Database, job_id: str) -> list[Shard]:
    """Those of a job, in the order of their parts."""
    query = select(JobRow.id, JobRow.part, JobRow.attempt, JobRow.status).where(JobRow.parent_id == job_id)
    with database.read() as session:
        rows = session.execute(query.order_by(JobRow.part)).all()
    return [Shard(row.id, row.part or 0, row.attempt, JobStatus(row.status)) for row in rows]
