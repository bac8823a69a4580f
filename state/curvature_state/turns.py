"""Whose turn it is: what a worker that is free takes up.

Of the tenants with queued jobs, the one that has had least of the workers, by its weight; of its jobs, those of the
highest priority; of these, the oldest that this worker can do. What it costs does not depend on how many are queued.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, CursorResult, Select, exists, func, or_, select, update
from sqlalchemy.orm import Session

from curvature_protocol.jobs import JobKind, JobStatus
from curvature_state.database import Database
from curvature_state.tables import JobRow, TenantRow
from curvature_state.tenants import QUEUED

HELD = (JobStatus.RUNNING, JobStatus.CANCELLING)
"""States in which a worker holds the job."""
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
            job_id = _next(session, claimant)
            if job_id is None:
                return None
            held = take(session, job_id, claimant.worker_id, lease_seconds)
            if held is not None:
                return held
    return None


def has_turn(database: Database, claimant: Claimant) -> bool:
    """Whether there is a job for this worker."""
    with database.read() as session:
        return _next(session, claimant, lock=False) is not None


def take(session: Session, job_id: str, worker_id: str, lease_seconds: float) -> ClaimedJob | None:
    """Queued → running with a lease; None if somebody else was faster or the job is over."""
    now = datetime.now(UTC)
    query = (
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.status == JobStatus.QUEUED)
        .values(
            status=JobStatus.RUNNING,
            attempt=JobRow.attempt + 1,
            lease_owner=worker_id,
            lease_expires_at=now + timedelta(seconds=lease_seconds),
            started_at=now,
            progress=None,
            not_before=None,
        )
        .execution_options(synchronize_session=False)
    )
    result = session.execute(query)
    assert isinstance(result, CursorResult)
    if result.rowcount != 1:
        return None
    row = session.get_one(JobRow, job_id)
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


def _next(session: Session, claimant: Claimant, *, lock: bool = True) -> str | None:
    """The id of the job whose turn it is."""
    for tenant, most in _tenants_in_turn(session):
        if lock and most is not None and not _has_room(session, tenant, most):
            continue
        query = _jobs_of(tenant, claimant)
        found: str | None = session.scalar(query.with_for_update(skip_locked=True) if lock else query)
        if found is not None:
            return found
    return None


def _has_room(session: Session, tenant: str, most: int) -> bool:
    """Whether a tenant may have another job running; until the transaction ends, nobody else starts one of its."""
    session.execute(select(TenantRow.name).where(TenantRow.name == tenant).with_for_update())
    mine = select(func.count()).where(JobRow.tenant == tenant, JobRow.status.in_(HELD))
    return (session.scalar(mine) or 0) < most


def _jobs_of(tenant: str, claimant: Claimant) -> Select[str]:
    now = datetime.now(UTC)
    fits: list[ColumnElement[bool]] = [
        or_(JobRow.not_before.is_(None), JobRow.not_before <= now),
        or_(JobRow.requires_tag.is_(None), JobRow.requires_tag.in_(claimant.tags)),
    ]
    if not claimant.gpu:
        fits.append(JobRow.requires_gpu.is_(False))
    if claimant.memory_bytes is not None:
        fits.append(JobRow.requires_bytes <= claimant.memory_bytes)
    waiting = select(JobRow.id).where(JobRow.tenant == tenant, QUEUED, *fits)
    return waiting.order_by(JobRow.turn, JobRow.created_at, JobRow.id).limit(1)


def _tenants_in_turn(session: Session) -> Iterator[tuple[str, int | None]]:
    """Tenants with queued jobs, the one that has had least first; and how many jobs each may have running."""
    waits = exists().where(JobRow.tenant == TenantRow.name, QUEUED)
    tenants = session.execute(
        select(TenantRow.name, TenantRow.weight, TenantRow.virtual_seconds, TenantRow.max_running).where(waits)
    ).all()
    if len(tenants) == 1:
        yield tenants[0].name, tenants[0].max_running
        return
    # What runs now is not charged yet: else all workers that become free at one moment would choose one tenant.
    now, running = datetime.now(UTC), defaultdict[str, list[float]](list)
    for tenant, started_at in session.execute(select(JobRow.tenant, JobRow.started_at).where(JobRow.status.in_(HELD))):
        running[tenant].append(0.0 if started_at is None else max(0.0, (now - started_at).total_seconds()))

    def had(tenant: Any) -> tuple[float, float, str]:
        mine = running[tenant.name]
        return tenant.virtual_seconds + sum(mine) / tenant.weight, len(mine) / tenant.weight, tenant.name

    for waiting in sorted(tenants, key=had):
        yield waiting.name, waiting.max_running
