"""Whose turn it is: what a worker that is free takes up.

Of the tenants with queued jobs, the one that has had least of the workers, by its weight; of its jobs, those of the
highest priority; of these, the oldest that this worker can do. What it costs does not depend on how many are queued.
"""

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import ColumnElement, Select, Table, and_, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from curvature_protocol.jobs import JobKind, JobStatus
from curvature_state.database import Database
from curvature_state.tables import JobRow, TenantRow
from curvature_state.tenants import QUEUED

if TYPE_CHECKING:
    from sqlalchemy.sql.dml import ReturningUpdate

HELD = (JobStatus.RUNNING, JobStatus.CANCELLING)
"""States in which a worker holds the job."""
_JOBS = cast("Table", JobRow.__table__)
_TRIES = 4
"""Rounds after a job was found and another worker took it."""


@dataclass(frozen=True)
class Claimant:
    """A worker, and what it has to offer.

    Attributes:
        memory_bytes: what one analysis may take; None: nobody knows.
    """

    worker_id: str
    gpu: bool = False
    tags: tuple[str, ...] = ()
    memory_bytes: int | None = None


@dataclass(frozen=True)
class ClaimedJob:
    """A job that a worker holds."""

    id: str
    attempt: int
    request: dict[str, Any]
    tenant: str
    created_at: datetime
    kind: JobKind = JobKind.ANALYSIS
    sweep_id: str | None = None
    parent_id: str | None = None
    parts: int | None = None


def claim_next(database: Database, claimant: Claimant, lease_seconds: float) -> ClaimedJob | None:
    """Queued → running with a lease, for the job whose turn it is; None if there is none for this worker."""
    for _ in range(_TRIES):
        with database.write() as session:
            tenants = _tenants_in_turn(session)
            for tenant, most in tenants:
                if most is not None and not _has_room(session, tenant, most):
                    continue
                held = _take_first(session, tenant, claimant, lease_seconds)
                if held is not None:
                    return held
        if not tenants:
            return None
    return None


def has_turn(database: Database, claimant: Claimant) -> bool:
    """Whether there is a job for this worker."""
    first, now = _first_job(claimant), datetime.now(UTC)
    with database.read() as session:
        return any(
            session.connection().scalar(first, {"of_tenant": tenant, "now": now}) is not None
            for tenant, _ in _tenants_in_turn(session)
        )


def take(session: Session, job_id: str, worker_id: str, lease_seconds: float) -> ClaimedJob | None:
    """Queued → running with a lease; None if somebody else was faster or the job is over."""
    this = and_(_JOBS.c.id == bindparam("of_job"), _JOBS.c.status == JobStatus.QUEUED)
    return _claimed(session, _take(this), worker_id, lease_seconds, of_job=job_id)


def _take_first(session: Session, tenant: str, claimant: Claimant, lease_seconds: float) -> ClaimedJob | None:
    return _claimed(session, _take_first_job(claimant), claimant.worker_id, lease_seconds, of_tenant=tenant)


def _claimed(
    session: Session, statement: "ReturningUpdate[Any]", worker_id: str, lease_seconds: float, **which: Any
) -> ClaimedJob | None:
    now = datetime.now(UTC)
    lease = {"now": now, "worker_id": worker_id, "expires_at": now + timedelta(seconds=lease_seconds)}
    row = session.connection().execute(statement, {**lease, **which}).one_or_none()
    if row is None:
        return None
    return ClaimedJob(
        row.id,
        row.attempt,
        row.request,
        row.tenant,
        row.created_at,
        JobKind(row.kind),
        row.sweep_id,
        row.parent_id,
        row.parts,
    )


# Statements: made once, since a statement takes longer to make than to run


def _take(which: ColumnElement[bool]) -> "ReturningUpdate[Any]":
    columns = ("id", "attempt", "request", "tenant", "created_at", "kind", "sweep_id", "parent_id", "parts")
    return (
        update(_JOBS)
        .where(which)
        .values(
            status=JobStatus.RUNNING,
            attempt=_JOBS.c.attempt + 1,
            lease_owner=bindparam("worker_id"),
            lease_expires_at=bindparam("expires_at"),
            started_at=bindparam("now"),
            progress=None,
            not_before=None,
        )
        .returning(*(_JOBS.c[name] for name in columns))
    )


@lru_cache
def _take_first_job(claimant: Claimant) -> "ReturningUpdate[Any]":
    first = _first_job(claimant).with_for_update(skip_locked=True)
    # It is queued, and locked. Said once more, PostgreSQL might look for it among all that are queued.
    return _take(_JOBS.c.id == first.scalar_subquery())


@lru_cache
def _first_job(claimant: Claimant) -> Select[str]:
    """The first of a tenant's jobs that a worker can do."""
    jobs = _JOBS.c
    fits: list[ColumnElement[bool]] = [
        or_(jobs.not_before.is_(None), jobs.not_before <= bindparam("now")),
        or_(jobs.requires_tag.is_(None), jobs.requires_tag.in_(claimant.tags)),
    ]
    if not claimant.gpu:
        fits.append(jobs.requires_gpu.is_(False))
    if claimant.memory_bytes is not None:
        fits.append(jobs.requires_bytes <= claimant.memory_bytes)
    waiting = select(jobs.id).where(jobs.tenant == bindparam("of_tenant"), QUEUED, *fits)
    return waiting.order_by(jobs.turn, jobs.created_at, jobs.id).limit(1)


_FIRST_WAITING = (
    select(_JOBS.c.id)
    .where(_JOBS.c.tenant == TenantRow.name, QUEUED)
    .order_by(_JOBS.c.turn, _JOBS.c.created_at)
    .limit(1)
    .scalar_subquery()
)
# Not EXISTS: PostgreSQL would join it, and where its statistics are older than the queue, by reading all of that.
_TENANTS = select(TenantRow.name, TenantRow.weight, TenantRow.virtual_seconds, TenantRow.max_running).where(
    _FIRST_WAITING.is_not(None)
)
_RUNNING = select(_JOBS.c.tenant, _JOBS.c.started_at).where(_JOBS.c.status.in_(HELD))


def _has_room(session: Session, tenant: str, most: int) -> bool:
    """Whether a tenant may have another job running; until the transaction ends, nobody else starts one of its."""
    session.execute(select(TenantRow.name).where(TenantRow.name == tenant).with_for_update())
    mine = select(func.count()).where(JobRow.tenant == tenant, JobRow.status.in_(HELD))
    return (session.scalar(mine) or 0) < most


def _tenants_in_turn(session: Session) -> list[tuple[str, int | None]]:
    """Tenants with queued jobs, the one that has had least first; and how many jobs each may have running."""
    connection = session.connection()
    tenants = connection.execute(_TENANTS).all()
    if len(tenants) <= 1:
        return [(tenant.name, tenant.max_running) for tenant in tenants]
    # What runs now is not charged yet: else all workers that become free at one moment would choose one tenant.
    now, running = datetime.now(UTC), defaultdict[str, list[float]](list)
    for tenant, started_at in connection.execute(_RUNNING):
        running[tenant].append(0.0 if started_at is None else max(0.0, (now - started_at).total_seconds()))

    def had(tenant: Any) -> tuple[float, float, str]:
        mine = running[tenant.name]
        return tenant.virtual_seconds + sum(mine) / tenant.weight, len(mine) / tenant.weight, tenant.name

    return [(waiting.name, waiting.max_running) for waiting in sorted(tenants, key=had)]
