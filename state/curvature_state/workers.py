"""Workers publish themselves, and with them the catalogue of extensions."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, select

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.health import WorkerView
from curvature_state.database import Database
from curvature_state.tables import WorkerRow

ALIVE_SECONDS = 15.0


def publish_worker(database: Database, worker: WorkerView, catalogue: Catalogue) -> None:
    """Write or refresh a worker's row; rows of workers gone for a day are removed."""
    with database.write() as session:
        session.merge(
            WorkerRow(
                id=worker.id,
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
    since = datetime.now(UTC) - timedelta(seconds=ALIVE_SECONDS)
    with database.read() as session:
        rows = session.scalars(select(WorkerRow).where(WorkerRow.seen_at >= since).order_by(WorkerRow.id)).all()
    return [
        WorkerView(id=r.id, device=r.device, engine_version=r.engine_version, isolation=r.isolation, seen_at=r.seen_at)
        for r in rows
    ]


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
        extensions=tuple(extensions.values()),
        losses=tuple(losses.values()),
    )
