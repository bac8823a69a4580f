"""Workers publish themselves, and with them the catalogue of extensions."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import WorkerView
from curvature_protocol.jobs import JobStatus
from curvature_state.database import Database
from curvature_state.tables import JobRow, WorkerRow

ALIVE_SECONDS = 15.0
HEARD_SECONDS = 5.0
"""How often a worker publishes itself, and hears whether it is to drain."""


def publish_worker(database: Database, worker: WorkerView, catalogue: Catalogue) -> None:
    """Write or refresh a worker's row; rows of workers gone for a day are removed.

    Whether it drains is the operator's to say, and what it is busy with its jobs' leases say.
    """
    with database.write() as session:
        # A merge writes the columns that are given, and leaves the others as they are.
        session.merge(
            WorkerRow(
                id=worker.id,
                name=worker.name,
                memory_bytes=worker.memory_bytes,
                tags=list(worker.tags),
                device=worker.device,
                engine_version=worker.engine_version,
                isolation=worker.isolation,
                catalogue=catalogue.model_dump(mode="json"),
                seen_at=worker.seen_at,
            )
        )
        session.execute(delete(WorkerRow).where(WorkerRow.seen_at < datetime.now(UTC) - timedelta(days=1)))


def remove_worker(database: Database, worker_id: str) -> None:
    """A worker that stops in order says so."""
    with database.write() as session:
        session.execute(delete(WorkerRow).where(WorkerRow.id == worker_id))


def forget_workers(database: Database) -> None:
    """Remove all rows: for whoever knows that no worker of this database runs."""
    with database.write() as session:
        session.execute(delete(WorkerRow))


def list_workers(database: Database) -> list[WorkerView]:
    """Workers seen lately."""
    with database.read() as session:
        rows = session.scalars(select(WorkerRow).where(_alive()).order_by(WorkerRow.id)).all()
        jobs = _jobs_held(session) if rows else {}
    return [
        WorkerView(
            id=r.id,
            name=r.name or "",
            device=r.device,
            memory_bytes=r.memory_bytes,
            tags=tuple(r.tags or ()),
            engine_version=r.engine_version,
            isolation=r.isolation,
            job=jobs.get(r.id),
            draining=r.draining,
            seen_at=r.seen_at,
        )
        for r in rows
    ]


def set_draining(database: Database, name: str, draining: bool) -> list[str]:
    """Have workers of an id or a name finish their jobs and take no others, or take jobs again; returns their ids."""
    query = update(WorkerRow).where(or_(WorkerRow.id == name, WorkerRow.name == name), _alive())
    with database.write() as session:
        changed = session.scalars(
            query.values(draining=draining).returning(WorkerRow.id).execution_options(synchronize_session=False)
        )
        return sorted(changed)


def is_draining(database: Database, worker_id: str) -> bool:
    """Whether a worker is to take no more jobs."""
    with database.read() as session:
        return session.scalar(select(WorkerRow.draining).where(WorkerRow.id == worker_id)) or False


def _alive() -> ColumnElement[bool]:
    return WorkerRow.seen_at >= datetime.now(UTC) - timedelta(seconds=ALIVE_SECONDS)


def _jobs_held(session: Session) -> dict[str, str]:
    """Worker → the job that it holds, by the leases."""
    held = JobRow.status.in_([JobStatus.RUNNING, JobStatus.CANCELLING])
    rows = session.execute(select(JobRow.lease_owner, JobRow.id).where(held, JobRow.lease_owner.is_not(None)))
    return {str(owner): job_id for owner, job_id in rows}


def published_catalogue(database: Database) -> Catalogue | None:
    """What workers can compute: the union of their catalogues, the freshest entry of each name.

    Workers that live count; while none does, those that lived when the last one was heard.
    """
    with database.read() as session:
        rows = session.scalars(select(WorkerRow).order_by(WorkerRow.seen_at)).all()
    if not rows:
        return None
    since = min(datetime.now(UTC), rows[-1].seen_at) - timedelta(seconds=ALIVE_SECONDS)
    catalogues = [Catalogue.model_validate(r.catalogue) for r in rows if r.seen_at >= since]
    extensions = {e.name: e for c in catalogues for e in c.extensions}
    losses = {loss.name: loss for c in catalogues for loss in c.losses}
    return Catalogue(
        engine_version=catalogues[-1].engine_version,
        rules=tuple(sorted({package for c in catalogues for package in c.rules})),
        extensions=tuple(extensions.values()),
        losses=tuple(losses.values()),
    )
