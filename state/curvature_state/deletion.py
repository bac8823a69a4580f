"""Deleting what somebody names: a job, a sweep, an upload. What cannot be deleted says why.

These wait for whoever holds the rows. The bytes go afterwards, see `removals`.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, or_, select
from sqlalchemy.orm import Session

from curvature_protocol.artefacts import ArtefactKind
from curvature_protocol.jobs import FINAL, JobStatus
from curvature_state import webhooks
from curvature_state.artefacts import Reference
from curvature_state.database import Database
from curvature_state.dropping import OVER, drop_jobs, forget_artefacts, forget_jobs
from curvature_state.removals import SWEEP, Removed, note_removals
from curvature_state.tables import ArtefactRow, JobArtefactRow, JobRow, RemovalRow, ResultUseRow, SweepRow

_PER_TRANSACTION = 500


class NotOver(Exception):
    """A job that is to be deleted is still at work."""

    def __init__(self, job_id: str, status: JobStatus) -> None:
        super().__init__(f"job {job_id} is {status}")
        self.job_id, self.status = job_id, status


class InUse(Exception):
    """Something is needed, or pinned.

    Attributes:
        why: a sentence.
        remedy: what to do first.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.why, self.remedy = why, remedy


def delete_job(database: Database, job_id: str) -> list[str] | None:
    """Remove a job that is over, with its shards; None if there is none.

    Files that another job's result refers to stay until that is gone, too.

    Returns: whose files may go now: the jobs that were removed, and those whose files they used.

    Raises:
        NotOver: it, or one of its shards.
        InUse: it is pinned, or a shard.
    """
    with database.write() as session:
        row = session.get(JobRow, job_id, with_for_update=True)
        if row is None:
            return None
        if row.parent_id is not None:
            raise InUse(f"job {job_id} is a part of job {row.parent_id}", f"delete job {row.parent_id}")
        shards = session.scalars(
            select(JobRow).where(JobRow.parent_id == job_id).order_by(JobRow.id).with_for_update()
        ).all()
        _check(row, *shards)
        removed = [job_id, *(shard.id for shard in shards)]
        its = select(JobRow.id).where(or_(JobRow.id == job_id, JobRow.parent_id == job_id))
        used = session.scalars(select(ResultUseRow.source_id).where(ResultUseRow.job_id.in_(its))).all()
        forget_jobs(session, removed)
        return [*removed, *used]


def _check(*rows: JobRow) -> None:
    for row in rows:
        if row.status not in FINAL:
            raise NotOver(row.id, JobStatus(row.status))
        if row.pinned:
            raise InUse(f"job {row.id} is pinned", f"DELETE /v1/jobs/{row.id}/pin first")


def delete_sweep(database: Database, tenant: str, sweep_id: str) -> bool:
    """Remove a sweep and its jobs, all of which must be over; False if the tenant has no such sweep.

    The sweep goes at once. Its jobs follow in parts; if this process does not live to the end of that, the next
    collection goes on.

    Raises:
        NotOver, InUse: as `delete_job`, of one of its jobs.
    """
    with database.write() as session:
        row = session.get(SweepRow, sweep_id, with_for_update=True)
        if row is None or row.tenant != tenant:
            return False
        over_data_sets = select(JobRow.id).where(JobRow.sweep_id == sweep_id, JobRow.parts.is_not(None))
        for which in (JobRow.sweep_id == sweep_id, JobRow.parent_id.in_(over_data_sets)):
            kept = session.scalars(select(JobRow).where(which, ~OVER | JobRow.pinned).limit(1)).all()
            _check(*kept)
        webhooks.forget(session, [sweep_id])
        session.delete(row)
        note_removals(session, [Removed(SWEEP, sweep_id, 0)])
    _clear_sweep(database, sweep_id)
    return True


def _clear_sweep(database: Database, sweep_id: str) -> None:
    """Remove its jobs; those that were taken up again by themselves stay for another time."""
    after = ""
    while True:
        query = select(JobRow.id).where(JobRow.sweep_id == sweep_id, JobRow.id > after).order_by(JobRow.id)
        with database.write() as session:
            job_ids = session.scalars(query.limit(_PER_TRANSACTION)).all()
            if not job_ids:
                break
            drop_jobs(session, job_ids)
        after = job_ids[-1]
    settle_deleted_sweeps(database)


def settle_deleted_sweeps(database: Database) -> None:
    """Strike the notes of sweeps that were deleted, and whose jobs are all gone."""
    empty = ~exists().where(JobRow.sweep_id == RemovalRow.name)
    with database.read() as session:
        done = session.scalars(select(RemovalRow.name).where(RemovalRow.what == SWEEP, empty)).all()
    if done:
        query = delete(RemovalRow).where(RemovalRow.what == SWEEP, RemovalRow.name.in_(done))
        with database.write() as session:
            session.execute(query.execution_options(synchronize_session=False))


def delete_artefact(database: Database, kind: ArtefactKind, sha256: str, tenant: str) -> bool:
    """Remove an upload that no unfinished job, and no job of another tenant, refers to; False if there is none.

    Raises:
        InUse: one does, or it is pinned.
    """
    reference: Reference = (kind, sha256)
    with database.write() as session:
        row = session.get(ArtefactRow, reference, with_for_update=True)
        if row is None:
            return False
        if row.pinned:
            raise InUse("it is pinned", f"DELETE /v1/{kind}/{sha256}/pin first")
        if needing := _referring(session, reference, JobRow.tenant == tenant, ~OVER):
            job = needing[0]
            raise InUse(f"job {job.id}, which is {job.status}, needs it", "wait for the job's end, or cancel it")
        if _referring(session, reference, JobRow.tenant != tenant):
            raise InUse("jobs of another tenant refer to it", "leave it: it is not yours alone")
        forget_artefacts(session, {reference: row.size_bytes})
        return True


def _referring(session: Session, reference: Reference, *which: ColumnElement[bool]) -> Sequence[Any]:
    """(id, status) of a job that refers to an upload, if one does."""
    kind, sha256 = reference
    mine = (JobArtefactRow.kind == kind, JobArtefactRow.sha256 == sha256)
    query = select(JobRow.id, JobRow.status).join(JobArtefactRow, JobArtefactRow.job_id == JobRow.id)
    return session.execute(query.where(*mine, *which).limit(1)).all()
