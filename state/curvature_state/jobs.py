"""The life of a job, each step one transaction and a compare-and-set on (status, attempt).

A step that ends an attempt is true once more for whoever repeats it: a commit may take effect and its acknowledgement
be lost. An attempt's number is never used again, so that an earlier holder's word never counts as a later one's.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import CursorResult, and_, case, func, literal, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from curvature_protocol.errors import Problem, status_of
from curvature_protocol.jobs import FINAL, Job, JobKind, JobStatus, Progress
from curvature_state.database import Database
from curvature_state.tables import JobRow, UtcDateTime

MAX_ATTEMPTS = 3
RING_AGAIN_SECONDS = 5.0
_MOST_BELLS = 1000


@dataclass(frozen=True)
class NewJob:
    """What is known of a job before it has a row."""

    request: dict[str, Any]
    body_digest: str
    idempotency_key: str | None = None
    tenant: str = "default"
    priority: int = 5
    metadata: dict[str, str] | None = None
    kind: JobKind = JobKind.ANALYSIS


@dataclass(frozen=True)
class ClaimedJob:
    """A job that a worker holds."""

    id: str
    attempt: int
    request: dict[str, Any]
    tenant: str
    created_at: datetime
    kind: JobKind = JobKind.ANALYSIS


@dataclass(frozen=True)
class Created:
    """The row of a request; `repeated` if its idempotency key had one already."""

    job: Job
    body_digest: str
    repeated: bool


@dataclass(frozen=True)
class Reconciled:
    """What the reconciler did: jobs it changed, and jobs whose bell is to be rung, with their priority."""

    changed: tuple[Job, ...]
    ring: Mapping[str, int]


def create_job(database: Database, new: NewJob) -> Created:
    """Write a queued job; with an idempotency key seen before, find that job instead."""
    now = datetime.now(UTC)
    row = JobRow(
        id=uuid.uuid4().hex,
        tenant=new.tenant,
        kind=new.kind,
        status=JobStatus.QUEUED,
        priority=new.priority,
        request=new.request,
        idempotency_key=new.idempotency_key,
        body_digest=new.body_digest,
        attempt=0,
        handed_back=0,
        warnings=[],
        details=new.metadata or {},
        created_at=now,
        rung_at=now,
    )
    if (found := find_by_key(database, new)) is not None:
        return found
    try:
        with database.write() as session:
            session.add(row)
        return Created(view(row), row.body_digest, repeated=False)
    except IntegrityError:  # a twin of this request was faster
        found = find_by_key(database, new)
        if found is None:
            raise
        return found


def find_by_key(database: Database, new: NewJob) -> Created | None:
    """The job that this request's idempotency key made before, if it did."""
    if new.idempotency_key is None:
        return None
    with database.read() as session:
        row = session.scalar(
            select(JobRow).where(JobRow.tenant == new.tenant, JobRow.idempotency_key == new.idempotency_key)
        )
    return None if row is None else Created(view(row), row.body_digest, repeated=True)


def forget_key(database: Database, job_id: str) -> None:
    """Take a finished job's idempotency key from it, so that the same request makes a new one."""
    query = update(JobRow).where(JobRow.id == job_id, JobRow.status.in_(FINAL)).values(idempotency_key=None)
    with database.write() as session:
        session.execute(query.execution_options(synchronize_session=False))


def get_job(database: Database, job_id: str, tenant: str | None = None) -> Job | None:
    """The job, or None: also for one that is not the tenant's, if a tenant is named."""
    with database.read() as session:
        row = session.get(JobRow, job_id)
    return None if row is None or tenant not in (None, row.tenant) else view(row)


def list_jobs(
    database: Database,
    *,
    tenant: str | None = None,
    kind: JobKind | None = JobKind.ANALYSIS,
    status: JobStatus | None,
    limit: int,
    before: tuple[datetime, str] | None,
) -> list[Job]:
    """Those of a tenant and a kind (None: all), newest first.

    `before` is the (created_at, id) of the previous page's last job.
    """
    query = select(JobRow).order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
    if tenant is not None:
        query = query.where(JobRow.tenant == tenant)
    if kind is not None:
        query = query.where(JobRow.kind == kind)
    if status is not None:
        query = query.where(JobRow.status == status)
    if before is not None:
        moment, job_id = before
        query = query.where(or_(JobRow.created_at < moment, and_(JobRow.created_at == moment, JobRow.id < job_id)))
    with database.read() as session:
        return [view(row) for row in session.scalars(query)]


def claim(database: Database, job_id: str, worker_id: str, lease_seconds: float) -> ClaimedJob | None:
    """Queued → running with a lease; None if somebody else was faster or the job is over."""
    now = datetime.now(UTC)
    with database.write() as session:
        changed = _set(
            session,
            job_id,
            [JobStatus.QUEUED],
            None,
            status=JobStatus.RUNNING,
            attempt=JobRow.attempt + 1,
            lease_owner=worker_id,
            lease_expires_at=now + timedelta(seconds=lease_seconds),
            started_at=now,
            progress=None,
        )
        row = session.get(JobRow, job_id) if changed else None
        if row is None:
            return None
        return ClaimedJob(row.id, row.attempt, row.request, row.tenant, row.created_at, JobKind(row.kind))


def renew(
    database: Database, job_id: str, attempt: int, lease_seconds: float, progress: Progress | None
) -> JobStatus | None:
    """Prolong the lease and note progress. None: the lease is lost; CANCELLING: the job is to stop."""
    values: dict[str, Any] = {"lease_expires_at": datetime.now(UTC) + timedelta(seconds=lease_seconds)}
    if progress is not None:
        values["progress"] = progress.model_dump()
    with database.write() as session:
        if not _set(session, job_id, [JobStatus.RUNNING, JobStatus.CANCELLING], attempt, **values):
            return None
        return _status(session, job_id)


def peek(database: Database, job_id: str, attempt: int) -> JobStatus | None:
    """The job's status as the holder of `attempt` sees it; None: the lease is lost."""
    with database.read() as session:
        found = session.execute(select(JobRow.status, JobRow.attempt).where(JobRow.id == job_id)).one_or_none()
    held = (JobStatus.RUNNING, JobStatus.CANCELLING)
    if found is None or found.attempt != attempt or found.status not in held:
        return None
    return JobStatus(found.status)


def succeed(database: Database, job_id: str, attempt: int, warnings: Sequence[str]) -> bool:
    """Running → succeeded; False if the lease was lost. A result that is there beats a cancellation."""
    return _finish(database, job_id, attempt, JobStatus.SUCCEEDED, warnings=list(warnings))


def fail(database: Database, job_id: str, attempt: int, problem: Problem) -> bool:
    """Running → failed; False if the lease was lost."""
    return _finish(database, job_id, attempt, JobStatus.FAILED, error=problem.model_dump())


def confirm_cancel(database: Database, job_id: str, attempt: int) -> bool:
    """Cancelling → cancelled; False if the lease was lost."""
    return _finish(database, job_id, attempt, JobStatus.CANCELLED)


def release(database: Database, job_id: str, attempt: int) -> bool:
    """Running → queued, not counted as a failed attempt: a stopping worker hands its job back."""
    with database.write() as session:
        released = _set(
            session,
            job_id,
            [JobStatus.RUNNING],
            attempt,
            status=JobStatus.QUEUED,
            handed_back=JobRow.handed_back + 1,
            lease_owner=None,
            lease_expires_at=None,
            progress=None,
            rung_at=datetime.fromtimestamp(0, UTC),
        )
        return released or _stands(session, job_id, JobStatus.QUEUED, attempt)


def request_cancel(database: Database, job_id: str) -> Job | None:
    """Queued → cancelled, running → cancelling; otherwise nothing. Returns the job as it is then, or None."""
    now, queued = literal(datetime.now(UTC), UtcDateTime), JobRow.status == JobStatus.QUEUED
    with database.write() as session:
        # One statement: between two, PostgreSQL would let a running job go back to the queue, unseen by either.
        _set(
            session,
            job_id,
            [JobStatus.QUEUED, JobStatus.RUNNING],
            None,
            status=case((queued, JobStatus.CANCELLED), else_=JobStatus.CANCELLING),
            finished_at=case((queued, now), else_=None),
        )
        row = session.get(JobRow, job_id)
        return None if row is None else view(row)


def reconcile(database: Database, max_attempts: int = MAX_ATTEMPTS, *, bells: int = 0) -> Reconciled:
    """Take jobs from workers that fell silent, and find queued jobs whose bell may have been lost.

    Args:
        database: the truth.
        max_attempts: attempts, but for those handed back, after which a job fails.
        bells: how many bells wait at the broker. No bell is lost while there are as many as queued jobs; ringing all
            the same would pile them up for as long as the workers are busy.
    """
    now = datetime.now(UTC)
    changed = _take_back_expired(database, now, max_attempts)
    ring = {job.id: job.priority for job in changed if job.status == JobStatus.QUEUED}
    return Reconciled(changed, ring | _find_unheard(database, now, bells))


def _take_back_expired(database: Database, now: datetime, max_attempts: int) -> tuple[Job, ...]:
    """Jobs whose lease ran out, as they are after it."""
    held = [JobStatus.RUNNING, JobStatus.CANCELLING]
    expired = select(JobRow).where(JobRow.status.in_(held), JobRow.lease_expires_at < now).order_by(JobRow.id)
    with database.read() as session:
        if session.scalar(expired.limit(1)) is None:
            return ()
    with database.write() as session:
        # Locked (PostgreSQL), so that a worker which finishes at this moment is not overwritten.
        rows = session.scalars(expired.with_for_update()).all()
        for row in rows:
            _take_back(row, now, max_attempts)
        return tuple(view(row) for row in rows)


def _find_unheard(database: Database, now: datetime, bells: int) -> dict[str, int]:
    """Queued jobs (and their priority) that no bell announces any more, marked as rung now."""
    stale = [JobRow.status == JobStatus.QUEUED, JobRow.rung_at < now - timedelta(seconds=RING_AGAIN_SECONDS)]
    chosen = select(JobRow.id).where(*stale).order_by(JobRow.priority.desc(), JobRow.created_at).limit(_MOST_BELLS)
    with database.read() as session:
        queued = session.scalar(select(func.count()).where(JobRow.status == JobStatus.QUEUED)) or 0
        ids = session.scalars(chosen).all() if queued > bells else []
    if not ids:
        return {}
    # The conditions once more: of several API processes, one rings.
    mark = update(JobRow).where(JobRow.id.in_(ids), *stale).values(rung_at=now).returning(JobRow.id, JobRow.priority)
    with database.write() as session:
        found = session.execute(mark.execution_options(synchronize_session=False)).all()
    order = {job_id: place for place, job_id in enumerate(ids)}
    return {row.id: row.priority for row in sorted(found, key=lambda row: order[row.id])}


def _take_back(row: JobRow, now: datetime, max_attempts: int) -> None:
    """What becomes of a job whose worker fell silent."""
    row.lease_owner = row.lease_expires_at = row.progress = None
    deaths = row.attempt - row.handed_back
    if row.status == JobStatus.CANCELLING:
        row.status, row.finished_at = JobStatus.CANCELLED, now
    elif deaths < max_attempts:
        row.status, row.rung_at = JobStatus.QUEUED, now
    else:
        row.status, row.finished_at = JobStatus.FAILED, now
        row.error = problem(
            "attempts_exhausted",
            f"the worker died {deaths} times while running this job",
            remedy="look for what kills the worker (memory, driver) in its log, then submit the job again",
        ).model_dump()


def oldest_queued(database: Database) -> str | None:
    """The id of the job that has waited longest at the highest priority, if any."""
    with database.read() as session:
        return session.scalar(
            select(JobRow.id)
            .where(JobRow.status == JobStatus.QUEUED)
            .order_by(JobRow.priority.desc(), JobRow.created_at)
            .limit(1)
        )


def problem(code: str, detail: str, *, param: str | None = None, remedy: str | None = None) -> Problem:
    """A problem with the code's own title and status."""
    return Problem(
        title=code.replace("_", " ").capitalize(),
        status=status_of(code),
        detail=detail,
        code=code,
        param=param,
        remedy=remedy,
    )


def view(row: JobRow) -> Job:
    """The row as the API shows it."""
    return Job(
        id=row.id,
        kind=JobKind(row.kind),
        status=JobStatus(row.status),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        attempt=row.attempt,
        priority=row.priority,
        progress=None if row.progress is None else Progress.model_validate(row.progress),
        error=None if row.error is None else Problem.model_validate(row.error),
        warnings=tuple(row.warnings),
        metadata=row.details,
        request=row.request,
    )


def _finish(database: Database, job_id: str, attempt: int, status: JobStatus, **values: Any) -> bool:
    held = [JobStatus.RUNNING, JobStatus.CANCELLING]
    with database.write() as session:
        finished = _set(
            session,
            job_id,
            held,
            attempt,
            status=status,
            finished_at=datetime.now(UTC),
            lease_owner=None,
            lease_expires_at=None,
            progress=None,
            **values,
        )
        return finished or _stands(session, job_id, status, attempt)


def _set(
    session: Session, job_id: str, statuses: Sequence[JobStatus], held_attempt: int | None, /, **values: Any
) -> bool:
    """Compare and set: change the row if it is in one of `statuses` (and at this attempt)."""
    query = update(JobRow).where(JobRow.id == job_id, JobRow.status.in_(statuses))
    if held_attempt is not None:
        query = query.where(JobRow.attempt == held_attempt)
    result = session.execute(query.values(**values).execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return bool(result.rowcount == 1)


def _stands(session: Session, job_id: str, status: JobStatus, attempt: int) -> bool:
    """Whether the job is in that very state already."""
    query = select(JobRow.id).where(JobRow.id == job_id, JobRow.status == status, JobRow.attempt == attempt)
    return session.scalar(query) is not None


def _status(session: Session, job_id: str) -> JobStatus:
    return JobStatus(session.execute(select(JobRow.status).where(JobRow.id == job_id)).scalar_one())
