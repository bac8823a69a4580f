"""Jobs as records: written, found, listed, shown. What becomes of them: `turns`, `holding` and `endings`."""

import itertools
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Row, and_, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Session

from curvature_protocol.errors import Problem, status_of
from curvature_protocol.jobs import FINAL, Job, JobKind, JobStatus, Progress
from curvature_protocol.requests import PRIORITIES, Requirements, Webhook
from curvature_state.artefacts import Reference, hold_artefacts
from curvature_state.database import Database
from curvature_state.tables import JobArtefactRow, JobRow, ResultUseRow
from curvature_state.tenants import enter_queue
from curvature_state.uses import hold_results
from curvature_state.webhooks import register

_NOTHING = Requirements()
_ROWS_PER_STATEMENT = 1000


@dataclass(frozen=True)
class SweepPlace:
    """A job's row in a sweep."""

    sweep_id: str
    row: int
    coordinates: dict[str, Any]


@dataclass(frozen=True)
class ReadyResult:
    """A result that is there before its job: every quantity was computed before, by the jobs `sources`."""

    warnings: tuple[str, ...]
    sources: tuple[str, ...]
    result_bytes: int


@dataclass(frozen=True)
class NewJob:
    """What is known of a job before it has a row.

    Attributes:
        artefacts: the uploads that it refers to; they stay as long as it is not over.
        parts: of a job over a data set: its shards, in order.
        result: if it is there already.
        id: given where something must be stored under it before.
    """

    request: dict[str, Any]
    body_digest: str
    idempotency_key: str | None = None
    tenant: str = "default"
    priority: int = 5
    metadata: dict[str, str] | None = None
    kind: JobKind = JobKind.ANALYSIS
    requires: Requirements = _NOTHING
    artefacts: frozenset[Reference] = frozenset()
    sweep: SweepPlace | None = None
    parts: tuple["NewJob", ...] = ()
    result: ReadyResult | None = None
    webhook: Webhook | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Created:
    """The row of a request; `repeated` if its idempotency key had one already."""

    job: Job
    body_digest: str
    repeated: bool


def create_job(database: Database, new: NewJob) -> Created:
    """Write a job, to be computed or with its result; with an idempotency key seen before, find that job instead.

    Raises:
        ArtefactMissing: an upload that it refers to is not there (any more).
        ResultGone: its result consists in part of others, and some of these were removed.
        QueueFull: the tenant has as many queued jobs as it may.
    """
    if (found := find_by_key(database, new)) is not None:
        return found
    try:
        with database.write() as session:
            insert_jobs(session, [new])
            row = session.get_one(JobRow, new.id)
            return Created(view(row), row.body_digest, repeated=False)
    except IntegrityError:  # a twin of this request was faster
        found = find_by_key(database, new)
        if found is None:
            raise
        return found


def insert_jobs(session: Session, jobs: Sequence[NewJob]) -> None:
    """Write many jobs and their shards, to be taken up in this order where their priorities are equal.

    Raises:
        ArtefactMissing, ResultGone, QueueFull: as `create_job`.
    """
    references = frozenset(reference for job in _with_parts(jobs) for reference in job.artefacts)
    hold_artefacts(session, references)
    hold_results(session, {source for job in jobs if job.result is not None for source in job.result.sources})
    waiting: dict[str, int] = {}
    for job in _with_parts(jobs):
        waiting[job.tenant] = waiting.get(job.tenant, 0) + (job.result is None and not job.parts)
    for tenant, count in waiting.items():
        enter_queue(session, tenant, count)
    _insert(session, JobRow, _rows(jobs))
    needs = ((job.id, kind, sha256) for job in _with_parts(jobs) for kind, sha256 in job.artefacts)
    _insert(session, JobArtefactRow, ({"job_id": job, "kind": kind, "sha256": sha256} for job, kind, sha256 in needs))
    uses = ((job.id, source) for job in jobs if job.result for source in set(job.result.sources))
    _insert(session, ResultUseRow, ({"job_id": job, "source_id": source} for job, source in uses))
    for job in jobs:
        if job.webhook is not None:
            register(session, "job", job.id, job.tenant, job.webhook)


def _insert(session: Session, table: type[DeclarativeBase], rows: Iterable[dict[str, Any]]) -> None:
    """Insert rows some at a time: those of a large sweep need not be in memory together."""
    rest = iter(rows)
    while some := list(itertools.islice(rest, _ROWS_PER_STATEMENT)):
        session.execute(insert(table), some)


def _rows(jobs: Sequence[NewJob]) -> Iterator[dict[str, Any]]:
    """Columns of jobs and their shards, in order."""
    now = datetime.now(UTC)
    # A microsecond apart: the queue is ordered by age.
    moments = (now + timedelta(microseconds=number) for number in itertools.count())
    for job in jobs:
        yield _values(job, next(moments))
        for place, part in enumerate(job.parts):
            yield {**_values(part, next(moments)), "parent_id": job.id, "part": place}


def _with_parts(jobs: Sequence[NewJob]) -> Iterable[NewJob]:
    for job in jobs:
        yield job
        yield from job.parts


def _values(new: NewJob, now: datetime) -> dict[str, Any]:
    status = JobStatus.WAITING if new.parts else JobStatus.QUEUED if new.result is None else JobStatus.SUCCEEDED
    ended = new.result is not None
    sweep = new.sweep
    return {
        "id": new.id,
        "tenant": new.tenant,
        "kind": new.kind,
        "status": status,
        "priority": new.priority,
        "turn": PRIORITIES[-1] - new.priority,
        "request": new.request,
        "idempotency_key": new.idempotency_key,
        "body_digest": new.body_digest,
        "attempt": 1 if ended else 0,
        "handed_back": 0,
        "warnings": list(new.result.warnings) if new.result is not None else [],
        "details": new.metadata or {},
        "created_at": now,
        "rung_at": now,
        "started_at": now if ended else None,
        "finished_at": now if ended else None,
        "used_at": now if ended else None,
        "requires_gpu": new.requires.gpu,
        "requires_tag": new.requires.tag,
        "requires_bytes": new.requires.memory_bytes,
        "worker_seconds": 0.0,
        "sweep_id": None if sweep is None else sweep.sweep_id,
        "sweep_row": None if sweep is None else sweep.row,
        "coordinates": None if sweep is None else sweep.coordinates,
        "parent_id": None,
        "part": None,
        "parts": len(new.parts) or None,
        "parts_left": len(new.parts) or None,
        "pinned": False,
        "webhook_waits": False,
        "result_bytes": new.result.result_bytes if new.result is not None else None,
    }


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


def view(row: JobRow | Row[Any]) -> Job:
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
        progress=_progress(row),
        error=None if row.error is None else Problem.model_validate(row.error),
        warnings=tuple(row.warnings),
        metadata=row.details,
        request=row.request,
        sweep=row.sweep_id,
        coordinates=row.coordinates,
        parent=row.parent_id,
        parts=row.parts,
        pinned=row.pinned,
    )


def _progress(row: JobRow | Row[Any]) -> Progress | None:
    if row.status == JobStatus.WAITING:
        parts = row.parts or 0
        return Progress(phase="shards", done=parts - (row.parts_left or 0), total=parts)
    return None if row.progress is None else Progress.model_validate(row.progress)
