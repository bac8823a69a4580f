"""Results that consist in part of files that other jobs stored: taken from the cache, or left with a data set's shards.

A result that is used is neither evicted, nor are its files removed with its job. Whoever writes down a new use holds
the results that are used, in the same transaction; whoever removes one locks it and then looks for uses.
"""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from curvature_protocol.jobs import JobStatus
from curvature_state.database import Database
from curvature_state.tables import JobRow, RemovalRow, ResultUseRow

USED_PRECISION_SECONDS = 60.0
"""Uses are noted to the minute."""
_PER_QUERY = 500
"""Ids in one statement."""
_THERE = (JobRow.status == JobStatus.SUCCEEDED, JobRow.result_bytes.is_not(None))


class ResultGone(Exception):
    """Results that were to be referred to are not there (any more)."""

    def __init__(self, job_ids: Collection[str]) -> None:
        super().__init__(f"the results of {', '.join(sorted(job_ids))} are gone")
        self.job_ids = frozenset(job_ids)


def hold_results(session: Session, sources: Collection[str]) -> None:
    """See that results are there, keep others from removing them until the transaction ends, and note their use.

    A job that was deleted counts as there while its files stay for the sake of another result that is there.

    Raises:
        ResultGone: some are not.
    """
    gone: set[str] = set()
    for part in in_parts(sources):
        # Shards come last: whoever removes a job over a data set locks it before its shards.
        order = (JobRow.parent_id.is_not(None), JobRow.id)
        held = session.scalars(
            select(JobRow.id).where(JobRow.id.in_(part), *_THERE).order_by(*order).with_for_update(read=True)
        ).all()
        gone |= set(part).difference(held)
        _touch(session, held)
    if gone:
        gone -= _kept_for_others(session, gone)
    if gone:
        raise ResultGone(gone)


def touch_result(database: Database, job_id: str) -> None:
    """Note that a job's result was read; most calls only look."""
    with database.read() as session:
        if session.scalar(select(JobRow.id).where(JobRow.id == job_id, _is_stale())) is None:
            return
    with database.write() as session:
        _touch(session, [job_id])


def _is_stale() -> ColumnElement[bool]:
    stale = datetime.now(UTC) - timedelta(seconds=USED_PRECISION_SECONDS)
    return or_(JobRow.used_at.is_(None), JobRow.used_at < stale)


def _touch(session: Session, job_ids: Collection[str]) -> None:
    # One at a time may write a row; who comes second has nothing to add.
    free = select(JobRow.id).where(JobRow.id.in_(job_ids), _is_stale()).with_for_update(skip_locked=True)
    if stale := session.scalars(free).all():
        noted = update(JobRow).where(JobRow.id.in_(stale)).values(used_at=datetime.now(UTC))
        session.execute(noted.execution_options(synchronize_session=False))


def _kept_for_others(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those whose files stay because others use them; the others' results are held."""
    deleted = select(RemovalRow.name).where(RemovalRow.what == "result", RemovalRow.name.in_(job_ids))
    users = select(ResultUseRow.job_id).where(ResultUseRow.source_id.in_(deleted))
    # Never waits: these are not locked in the order in which the others were.
    there = select(JobRow.id).where(JobRow.id.in_(users), *_THERE).with_for_update(read=True, skip_locked=True)
    held = session.scalars(there).all()
    kept = select(ResultUseRow.source_id).where(ResultUseRow.source_id.in_(deleted), ResultUseRow.job_id.in_(held))
    return set(session.scalars(kept))


def in_parts(names: Iterable[str]) -> Iterable[list[str]]:
    """Names, as many at a time as one statement takes."""
    ordered = sorted(names)
    return (ordered[first : first + _PER_QUERY] for first in range(0, len(ordered), _PER_QUERY))
