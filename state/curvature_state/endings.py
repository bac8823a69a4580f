"""How a job comes to its end, or to another attempt; and what that means for the job over the data set it is part of.

Whoever ends a shard locks the job over the data set first: two locks taken in two orders would wait for each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import ColumnElement, Table, and_, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from curvature_protocol.errors import Problem
from curvature_protocol.jobs import Job, JobStatus
from curvature_state.artefacts import hold_artefacts_of
from curvature_state.database import Database, insert_new
from curvature_state.jobs import problem, view
from curvature_state.tables import CachedResultRow, JobRow, ResultUseRow
from curvature_state.tenants import charge, enter_queue
from curvature_state.turns import HELD
from curvature_state.uses import hold_results
from curvature_state.webhooks import rearm

MAX_ATTEMPTS = 5
"""After so many that failed for a passing reason, a job fails."""
PASSING = frozenset({"worker_crashed", "unavailable"})
"""Errors that another attempt may not meet."""
RETRIED = (JobStatus.FAILED, JobStatus.CANCELLED)
"""States from which a job is taken up again when somebody asks for it."""
TO_COMPUTE = or_(JobRow.status.in_(RETRIED), and_(JobRow.status == JobStatus.SUCCEEDED, JobRow.result_bytes.is_(None)))
"""Of the shards of a job that is taken up again, those that have no result (any more)."""
_FIRST_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Ending:
    """A job as it is after an attempt, and the other jobs that changed with it."""

    job: Job
    others: tuple[Job, ...] = ()


@dataclass(frozen=True)
class Success:
    """What a worker made.

    Attributes:
        result_bytes: of the files that this attempt stored.
        sources: jobs whose files the result refers to.
        cached: cache key → label, of what others may take.
    """

    warnings: Sequence[str] = ()
    result_bytes: int = 0
    sources: frozenset[str] = frozenset()
    cached: Mapping[str, str] = field(default_factory=dict)


def succeed(database: Database, job_id: str, attempt: int, success: Success = Success()) -> Ending | None:
    """Running → succeeded; None if the lease was lost. A result that is there beats a cancellation.

    Raises:
        ResultGone: some of the `sources` were removed; the job goes on running.
    """
    with database.write() as session:
        connection, now = session.connection(), datetime.now(UTC)
        before = connection.execute(_BEFORE, {"of_job": job_id}).one_or_none()
        if before is None:
            return None
        parent = None
        if before.parent_id is not None:
            parent = session.get(JobRow, before.parent_id, with_for_update=True)
        seconds = 0.0 if before.started_at is None else max(0.0, (now - before.started_at).total_seconds())
        values = {
            "of_job": job_id,
            "held_attempt": attempt,
            "now": now,
            "told": list(success.warnings),
            "stored_bytes": success.result_bytes,
            "seconds": seconds,
        }
        row = connection.execute(_SUCCEED, values).one_or_none()
        if row is None:
            found = session.get(JobRow, job_id)
            stands = found is not None and found.attempt == attempt and found.status == JobStatus.SUCCEEDED
            return Ending(view(found)) if found is not None and stands else None
        hold_results(session, success.sources)
        charge(session, row.tenant, seconds)
        insert_new(session, ResultUseRow, [{"job_id": job_id, "source_id": source} for source in success.sources])
        stored = {"tenant": row.tenant, "job_id": job_id, "attempt": attempt, "created_at": now}
        cached = [{**stored, "key": key, "label": label} for key, label in success.cached.items()]
        insert_new(session, CachedResultRow, cached)
        others = () if parent is None else _count_down(parent)
        return Ending(view(row), others)


# Made once: a statement takes longer to make than to run.
_JOBS = cast("Table", JobRow.__table__)
_BEFORE = select(_JOBS.c.parent_id, _JOBS.c.started_at).where(_JOBS.c.id == bindparam("of_job"))
_SUCCEED = (
    update(_JOBS)
    .where(_JOBS.c.id == bindparam("of_job"), _JOBS.c.attempt == bindparam("held_attempt"), _JOBS.c.status.in_(HELD))
    .values(
        status=JobStatus.SUCCEEDED,
        finished_at=bindparam("now"),
        used_at=bindparam("now"),
        warnings=bindparam("told", type_=_JOBS.c.warnings.type),
        result_bytes=bindparam("stored_bytes"),
        worker_seconds=_JOBS.c.worker_seconds + bindparam("seconds"),
        lease_owner=None,
        lease_expires_at=None,
        progress=None,
    )
    .returning(*_JOBS.c)
)


def fail(
    database: Database, job_id: str, attempt: int, reason: Problem, max_attempts: int = MAX_ATTEMPTS
) -> Ending | None:
    """Running → failed, or queued once more where the reason may pass; None if the lease was lost."""
    with database.write() as session:
        row, parent = _locked(session, job_id)
        if row is None or row.attempt != attempt:
            return None
        tried_again = row.status == JobStatus.QUEUED and row.not_before is not None
        if row.status == JobStatus.FAILED or tried_again:
            return Ending(view(row))
        if row.status not in HELD:
            return None
        return _fail(session, row, parent, reason, max_attempts)


def confirm_cancel(database: Database, job_id: str, attempt: int) -> Ending | None:
    """Cancelling → cancelled; None if the lease was lost."""
    with database.write() as session:
        row, parent = _locked(session, job_id)
        if row is None or row.attempt != attempt:
            return None
        if row.status in HELD:
            _cancel_held(session, row, parent)
        taken_up_again = row.status == JobStatus.QUEUED and row.parent_id is not None
        return Ending(view(row)) if row.status == JobStatus.CANCELLED or taken_up_again else None


def take_back(database: Database, job_id: str, max_attempts: int = MAX_ATTEMPTS) -> Ending | None:
    """Take a job from a worker whose lease ran out; None if that did not."""
    with database.write() as session:
        row, parent = _locked(session, job_id)
        now = datetime.now(UTC)
        if row is None or row.status not in HELD or row.lease_expires_at is None or row.lease_expires_at >= now:
            return None
        deaths = row.attempt - row.handed_back
        reason = problem(
            "attempts_exhausted",
            f"the worker died {deaths} times while running this job",
            remedy="look for what kills the worker (memory, driver) in its log, then submit the job again",
        )
        return _fail(session, row, parent, reason, max_attempts, passing=True)


def request_cancel(database: Database, job_id: str) -> Ending | None:
    """Queued → cancelled, running → cancelling, and a data set's shards alike; otherwise nothing. None: no such job."""
    with database.write() as session:
        row, _ = _locked(session, job_id)
        return None if row is None else stop(session, row)


def stop(session: Session, row: JobRow) -> Ending:
    """`request_cancel` of a row that is locked."""
    others: tuple[Job, ...] = ()
    if row.status in (JobStatus.QUEUED, JobStatus.WAITING):
        others = _cancel_parts(session, row)
        _end(session, row, JobStatus.CANCELLED)
    elif row.status == JobStatus.RUNNING:
        row.status = JobStatus.CANCELLING
    session.flush()
    return Ending(view(row), others)


def retry(database: Database, job_id: str) -> Ending | None:
    """Failed or cancelled → queued, with all its attempts again; of a data set, only what has not succeeded.

    A job in any other state stays as it is. None: no such job.

    Raises:
        ArtefactMissing: an upload that it needs was removed.
        QueueFull: the tenant has as many queued jobs as it may.
    """
    with database.write() as session:
        row, _ = _locked(session, job_id)
        if row is None:
            return None
        if row.status not in RETRIED:
            return Ending(view(row))
        shards = parts_to_retry(session, row)
        anew = (JobRow.parent_id == row.id, TO_COMPUTE) if row.parts is not None else (JobRow.id == row.id,)
        hold_artefacts_of(session, *anew)
        enter_queue(session, row.tenant, len(shards) or 1)
        return take_up(session, row, shards)


def parts_to_retry(session: Session, row: JobRow) -> Sequence[JobRow]:
    """The shards of a failed or cancelled job that are to be computed again, locked."""
    return _parts_of(session, row, TO_COMPUTE)


def take_up(session: Session, row: JobRow, shards: Sequence[JobRow]) -> Ending:
    """`retry` of a row that is locked; `shards` are its `parts_to_retry`."""
    for each in (*shards, row):
        _requeue(each)
    if row.parts is not None:
        session.flush()
        row.parts_left = _count_left(session, row)
        row.status = JobStatus.WAITING if row.parts_left else JobStatus.QUEUED
    session.flush()
    rearm(session, [row.id] if row.sweep_id is None else [row.id, row.sweep_id])
    return Ending(view(row), tuple(view(shard) for shard in shards))


def _locked(session: Session, job_id: str) -> tuple[JobRow | None, JobRow | None]:
    """(the job's row, that of the job over the data set it is a shard of), locked in the order that all keep to."""
    parent_id = session.scalar(select(JobRow.parent_id).where(JobRow.id == job_id))
    parent = None if parent_id is None else session.get(JobRow, parent_id, with_for_update=True)
    return session.get(JobRow, job_id, with_for_update=True), parent


def _end(session: Session, row: JobRow, status: JobStatus) -> None:
    """Write down an end, and whose time it took."""
    row.status, row.finished_at = status, datetime.now(UTC)
    _let_go(session, row)


def _let_go(session: Session, row: JobRow) -> None:
    """The attempt is over: its lease, and the time it took."""
    if row.lease_owner is not None and row.started_at is not None:
        seconds = max(0.0, (datetime.now(UTC) - row.started_at).total_seconds())
        row.worker_seconds += seconds
        charge(session, row.tenant, seconds)
    row.lease_owner = row.lease_expires_at = row.progress = None


def _fail(
    session: Session, row: JobRow, parent: JobRow | None, reason: Problem, max_attempts: int, *, passing: bool = False
) -> Ending:
    """What becomes of a job whose attempt failed."""
    if row.status == JobStatus.CANCELLING:
        _cancel_held(session, row, parent)
        return Ending(view(row))
    deaths = row.attempt - row.handed_back
    if (passing or reason.code in PASSING) and deaths < max_attempts:
        _let_go(session, row)
        row.status = JobStatus.QUEUED
        row.not_before = datetime.now(UTC) + timedelta(seconds=_FIRST_PAUSE_SECONDS * 2.0 ** (deaths - 1))
        return Ending(view(row))
    _end(session, row, JobStatus.FAILED)
    row.error = reason.model_dump()
    others: tuple[Job, ...] = ()
    if parent is not None and parent.status == JobStatus.WAITING:
        siblings = _cancel_parts(session, parent)
        _end(session, parent, JobStatus.FAILED)
        where = f"part {row.part} of {parent.parts}: {reason.detail}"
        parent.error = reason.model_copy(update={"detail": where}).model_dump()
        others = (view(parent), *siblings)
    session.flush()
    return Ending(view(row), others)


def _cancel_held(session: Session, row: JobRow, parent: JobRow | None) -> None:
    """A running job stops; a shard whose data set was taken up again meanwhile goes back to the queue."""
    if parent is not None and parent.status == JobStatus.WAITING:
        _let_go(session, row)
        _requeue(row)
    else:
        _end(session, row, JobStatus.CANCELLED)


def _requeue(row: JobRow) -> None:
    """Queue a job anew, as if it had not been tried."""
    row.status, row.handed_back = JobStatus.QUEUED, row.attempt
    row.error = row.finished_at = row.not_before = None


def requeue_all(session: Session, *which: ColumnElement[bool]) -> None:
    """The same of many jobs without shards."""
    values: dict[str, Any] = {"status": JobStatus.QUEUED, "handed_back": JobRow.attempt}
    cleared = dict.fromkeys(("error", "finished_at", "not_before"))
    query = update(JobRow).where(*which).values(**values, **cleared)
    session.execute(query.execution_options(synchronize_session=False))


def stop_all(session: Session, *which: ColumnElement[bool]) -> None:
    """`stop` of many jobs without shards."""
    now = datetime.now(UTC)
    running = update(JobRow).where(*which, JobRow.status == JobStatus.RUNNING).values(status=JobStatus.CANCELLING)
    queued = update(JobRow).where(*which, JobRow.status == JobStatus.QUEUED)
    for query in (running, queued.values(status=JobStatus.CANCELLED, finished_at=now)):
        session.execute(query.execution_options(synchronize_session=False))


def _count_down(parent: JobRow) -> tuple[Job, ...]:
    """One more shard has succeeded; after the last, what they made is to be merged."""
    parent.parts_left = max(0, (parent.parts_left or 0) - 1)
    if parent.status != JobStatus.WAITING:
        return ()
    if parent.parts_left == 0:
        parent.status = JobStatus.QUEUED
    return (view(parent),)


def _count_left(session: Session, parent: JobRow) -> int:
    left = select(func.count()).where(JobRow.parent_id == parent.id, JobRow.status != JobStatus.SUCCEEDED)
    return session.scalar(left) or 0


def _parts_of(session: Session, parent: JobRow, which: ColumnElement[bool]) -> Sequence[JobRow]:
    if parent.parts is None:
        return ()
    query = select(JobRow).where(JobRow.parent_id == parent.id, which).order_by(JobRow.part)
    return session.scalars(query.with_for_update()).all()


def _cancel_parts(session: Session, parent: JobRow) -> tuple[Job, ...]:
    """Stop the shards that are not over."""
    if parent.parts is None:
        return ()
    now = datetime.now(UTC)
    mine = [JobRow.parent_id == parent.id]
    quiet: dict[str, Any] = {"synchronize_session": False}
    session.flush()
    running = update(JobRow).where(*mine, JobRow.status == JobStatus.RUNNING)
    stopped = session.scalars(
        running.values(status=JobStatus.CANCELLING).returning(JobRow.id).execution_options(**quiet)
    )
    stopping = list(stopped)
    queued = update(JobRow).where(*mine, JobRow.status == JobStatus.QUEUED)
    session.execute(queued.values(status=JobStatus.CANCELLED, finished_at=now).execution_options(**quiet))
    # Those who follow a shard that runs are told; of the others, nobody has heard.
    return tuple(view(shard) for shard in session.scalars(select(JobRow).where(JobRow.id.in_(stopping))))
