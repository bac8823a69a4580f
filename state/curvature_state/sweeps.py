"""Sweeps as records: many jobs written in one transaction, and looked at, stopped and taken up again together.

A sweep's rows are ordinary jobs; the shards of a row over a data set are none of its rows. What changes many of a
sweep's jobs at once locks the sweep first.
"""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import and_, func, insert, or_, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from curvature_protocol.errors import Problem
from curvature_protocol.jobs import FINAL, Job, JobStatus
from curvature_protocol.requests import Webhook
from curvature_protocol.sweeps import LETTERS, NO_JOB, Sweep, SweepRowView
from curvature_state.artefacts import hold_artefacts_of
from curvature_state.database import Database
from curvature_state.endings import RETRIED, TO_COMPUTE, parts_to_retry, requeue_all, stop, stop_all, take_up
from curvature_state.jobs import NewJob, insert_jobs
from curvature_state.tables import UNFINISHED_IN_SWEEP, JobRow, SweepRow
from curvature_state.tenants import enter_queue
from curvature_state.webhooks import rearm, register


@dataclass(frozen=True)
class NewSweep:
    """What is known of a sweep before it has a row.

    Attributes:
        jobs: its rows, in order; each names the sweep's `id` as its `sweep`.
        axes: names of their coordinates.
        webhook: whom to tell when all of them are over.
    """

    jobs: Sequence[NewJob]
    axes: tuple[str, ...]
    body_digest: str
    idempotency_key: str | None = None
    tenant: str = "default"
    metadata: dict[str, str] | None = None
    webhook: Webhook | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class CreatedSweep:
    """The row of a request; `repeated` if its idempotency key had one already."""

    sweep: Sweep
    body_digest: str
    repeated: bool


@dataclass(frozen=True)
class Changed:
    """A sweep after its jobs were stopped or taken up again, and jobs over data sets and shards that changed with it.

    Of its other jobs, as many as there may be, none is named.
    """

    sweep: Sweep
    jobs: tuple[Job, ...] = ()


def create_sweep(database: Database, new: NewSweep) -> CreatedSweep:
    """Write a sweep and all its jobs, or nothing; with an idempotency key seen before, find that sweep instead.

    Raises:
        ArtefactMissing: an upload that a job refers to is not there (any more).
        QueueFull: the tenant has no room for so many.
    """
    if (found := find_by_key(database, new.tenant, new.idempotency_key)) is not None:
        return found
    try:
        with database.write() as session:
            session.execute(insert(SweepRow), [_values(new)])
            insert_jobs(session, new.jobs)
            if new.webhook is not None:
                register(session, "sweep", new.id, new.tenant, new.webhook)
            row = session.get_one(SweepRow, new.id)
            return CreatedSweep(_view(row, _count(session, [new.id])[new.id]), new.body_digest, repeated=False)
    except IntegrityError:  # a twin of this request was faster
        found = find_by_key(database, new.tenant, new.idempotency_key)
        if found is None:
            raise
        return found


def find_by_key(database: Database, tenant: str, key: str | None) -> CreatedSweep | None:
    """The sweep that an idempotency key made before, if it did."""
    if key is None:
        return None
    with database.read() as session:
        row = session.scalar(select(SweepRow).where(SweepRow.tenant == tenant, SweepRow.idempotency_key == key))
        if row is None:
            return None
        return CreatedSweep(_view(row, _count(session, [row.id])[row.id]), row.body_digest, repeated=True)


def get_sweep(database: Database, sweep_id: str, tenant: str | None = None) -> Sweep | None:
    """The sweep, or None: also for one that is not the tenant's, if a tenant is named."""
    with database.read() as session:
        row = session.get(SweepRow, sweep_id)
        if row is None or tenant not in (None, row.tenant):
            return None
        return _view(row, _count(session, [sweep_id])[sweep_id])


def list_sweeps(database: Database, tenant: str, *, limit: int, before: tuple[datetime, str] | None) -> list[Sweep]:
    """A tenant's, newest first; `before` is the (created_at, id) of the previous page's last one."""
    query = select(SweepRow).where(SweepRow.tenant == tenant)
    if before is not None:
        moment, sweep_id = before
        older = and_(SweepRow.created_at == moment, SweepRow.id < sweep_id)
        query = query.where(or_(SweepRow.created_at < moment, older))
    with database.read() as session:
        rows = session.scalars(query.order_by(SweepRow.created_at.desc(), SweepRow.id.desc()).limit(limit)).all()
        counts = _count(session, [row.id for row in rows])
        return [_view(row, counts[row.id]) for row in rows]


def list_rows(
    database: Database, sweep_id: str, *, first: int, limit: int, statuses: Collection[JobStatus] | None = None
) -> list[tuple[SweepRowView, int]]:
    """(row, attempt) from row number `first` on, in their order; `statuses` leaves out those in other states."""
    columns = (
        *(JobRow.sweep_row, JobRow.id, JobRow.coordinates, JobRow.status, JobRow.error, JobRow.attempt),
        *(JobRow.created_at, JobRow.started_at, JobRow.finished_at),
    )
    query = select(*columns).where(JobRow.sweep_id == sweep_id, JobRow.sweep_row >= first)
    if statuses is not None:
        query = query.where(JobRow.status.in_(statuses))
    with database.read() as session:
        found = session.execute(query.order_by(JobRow.sweep_row).limit(limit)).all()
    return [(_row_view(row), row.attempt) for row in found]


def read_states(database: Database, sweep_id: str, total: int) -> str:
    """A letter per row, in order."""
    query = select(JobRow.sweep_row, JobRow.status).where(JobRow.sweep_id == sweep_id)
    letters = [NO_JOB] * total
    with database.read() as session:
        for place, status in session.execute(query):
            assert place is not None
            letters[place] = LETTERS[JobStatus(status)]
    return "".join(letters)


def is_unfinished(database: Database, sweep_id: str) -> bool:
    """Whether a job of the sweep is not over."""
    query = select(JobRow.id).where(JobRow.sweep_id == sweep_id, text(UNFINISHED_IN_SWEEP)).limit(1)
    with database.read() as session:
        return session.scalar(query) is not None


def find_end(database: Database, sweep_id: str) -> datetime | None:
    """When the last of its jobs that are over ended."""
    with database.read() as session:
        return session.scalar(select(func.max(JobRow.finished_at)).where(JobRow.sweep_id == sweep_id))


def cancel_sweep(database: Database, sweep_id: str, tenant: str) -> Changed | None:
    """`request_cancel` of all its jobs that are not over. None: the tenant has no such sweep."""
    with database.write() as session:
        row = _locked(session, sweep_id, tenant)
        if row is None:
            return None
        mine = JobRow.sweep_id == sweep_id
        over_data_sets = _jobs_over_data_sets(session, sweep_id, [s for s in JobStatus if s not in FINAL])
        endings = [stop(session, job) for job in over_data_sets]
        stop_all(session, mine, JobRow.parts.is_(None))
        changed = tuple(job for ending in endings for job in (ending.job, *ending.others))
        return Changed(_view(row, _count(session, [sweep_id])[sweep_id]), changed)


def retry_sweep(database: Database, sweep_id: str, tenant: str) -> Changed | None:
    """`retry` of all its failed and cancelled jobs, or of none. None: the tenant has no such sweep.

    Raises:
        ArtefactMissing: an upload that one of them needs was removed.
        QueueFull: the tenant has no room for so many.
    """
    with database.write() as session:
        row = _locked(session, sweep_id, tenant)
        if row is None:
            return None
        plain = [JobRow.sweep_id == sweep_id, JobRow.status.in_(RETRIED), JobRow.parts.is_(None)]
        count = len(session.scalars(select(JobRow.id).where(*plain).order_by(JobRow.id).with_for_update()).all())
        parents = _jobs_over_data_sets(session, sweep_id, RETRIED)
        shards = [parts_to_retry(session, parent) for parent in parents]
        over_data_sets = select(JobRow.id).where(JobRow.sweep_id == sweep_id, JobRow.status.in_(RETRIED))
        for anew in (plain, [JobRow.parent_id.in_(over_data_sets), TO_COMPUTE]):
            hold_artefacts_of(session, *anew)
        enter_queue(session, tenant, count + sum(len(parts) or 1 for parts in shards))
        requeue_all(session, *plain)
        endings = [take_up(session, parent, parts) for parent, parts in zip(parents, shards, strict=True)]
        if count or parents:
            rearm(session, [sweep_id])
        changed = tuple(job for ending in endings for job in (ending.job, *ending.others))
        return Changed(_view(row, _count(session, [sweep_id])[sweep_id]), changed)


def count_queued(database: Database, sweep_id: str) -> dict[tuple[bool, str | None], tuple[str, int]]:
    """(whether a GPU is required, the required tag) → (a queued job, how many there are), shards included."""
    kind = (JobRow.requires_gpu, JobRow.requires_tag)
    kinds = select(func.min(JobRow.id), func.count(), *kind).where(JobRow.status == JobStatus.QUEUED).group_by(*kind)
    over_data_sets = select(JobRow.id).where(JobRow.sweep_id == sweep_id, JobRow.parts.is_not(None))
    found: dict[tuple[bool, str | None], tuple[str, int]] = {}
    with database.read() as session:
        for which in (JobRow.sweep_id == sweep_id, JobRow.parent_id.in_(over_data_sets)):
            for job_id, count, gpu, tag in session.execute(kinds.where(which)):
                first, more = found.get((gpu, tag), (job_id, 0))
                found[gpu, tag] = first, more + count
    return found


def _locked(session: Session, sweep_id: str, tenant: str) -> SweepRow | None:
    row = session.get(SweepRow, sweep_id, with_for_update=True)
    return None if row is None or row.tenant != tenant else row


def _jobs_over_data_sets(session: Session, sweep_id: str, statuses: Collection[JobStatus]) -> Sequence[JobRow]:
    which = [JobRow.sweep_id == sweep_id, JobRow.parts.is_not(None), JobRow.status.in_(statuses)]
    return session.scalars(select(JobRow).where(*which).order_by(JobRow.sweep_row).with_for_update()).all()


def _count(session: Session, sweep_ids: Sequence[str]) -> dict[str, dict[JobStatus, int]]:
    counts: dict[str, dict[JobStatus, int]] = {sweep_id: {} for sweep_id in sweep_ids}
    query = select(JobRow.sweep_id, JobRow.status, func.count()).where(JobRow.sweep_id.in_(sweep_ids))
    for sweep_id, status, count in session.execute(query.group_by(JobRow.sweep_id, JobRow.status)):
        assert sweep_id is not None
        counts[sweep_id][JobStatus(status)] = count
    return counts


def _values(new: NewSweep) -> dict[str, Any]:
    return {
        "id": new.id,
        "tenant": new.tenant,
        "idempotency_key": new.idempotency_key,
        "body_digest": new.body_digest,
        "total": len(new.jobs),
        "axes": list(new.axes),
        "details": new.metadata or {},
        "created_at": datetime.now(UTC),
    }


def _view(row: SweepRow, counts: dict[JobStatus, int]) -> Sweep:
    return Sweep(
        id=row.id,
        created_at=row.created_at,
        total=row.total,
        counts=counts,
        done=FINAL.issuperset(counts),
        axes=tuple(row.axes),
        metadata=row.details,
    )


def _row_view(row: Any) -> SweepRowView:
    return SweepRowView(
        row=row.sweep_row,
        job_id=row.id,
        coordinates=row.coordinates or {},
        status=JobStatus(row.status),
        error=None if row.error is None else Problem.model_validate(row.error),
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )
