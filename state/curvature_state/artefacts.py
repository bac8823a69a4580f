"""Records of uploads."""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from sqlalchemy import select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from curvature_protocol.artefacts import Artefact, ArtefactKind
from curvature_state.database import Database
from curvature_state.tables import ArtefactRow

Reference = tuple[ArtefactKind, str]
"""(kind, SHA-256)"""
USED_PRECISION_SECONDS = 60.0
"""Uses are noted to the minute: else every job would write the row of the model that all of them share."""
_PER_QUERY = 500


class ArtefactMissing(Exception):
    """An upload is not there (any more)."""

    def __init__(self, kind: ArtefactKind, sha256: str) -> None:
        super().__init__(f"{kind}/{sha256}")
        self.kind, self.sha256 = kind, sha256


def hold_artefacts(session: Session, references: Collection[Reference]) -> None:
    """See that uploads are there, keep others from removing them until the transaction ends, and note their use.

    Raises:
        ArtefactMissing: one is not.
    """
    wanted = sorted(references)
    now = datetime.now(UTC)
    for first in range(0, len(wanted), _PER_QUERY):
        part = wanted[first : first + _PER_QUERY]
        named = tuple_(ArtefactRow.kind, ArtefactRow.sha256).in_(part)
        found = session.execute(
            select(ArtefactRow.kind, ArtefactRow.sha256, ArtefactRow.used_at)
            .where(named)
            .order_by(ArtefactRow.kind, ArtefactRow.sha256)
            .with_for_update(read=True)
        ).all()
        if missing := set(part) - {(row.kind, row.sha256) for row in found}:
            raise ArtefactMissing(*min(missing))
        stale = now - timedelta(seconds=USED_PRECISION_SECONDS)
        old = [(row.kind, row.sha256) for row in found if row.used_at is None or row.used_at < stale]
        if old:
            # One at a time may write it; who comes second has nothing to add.
            free = (
                select(ArtefactRow.kind, ArtefactRow.sha256)
                .where(tuple_(ArtefactRow.kind, ArtefactRow.sha256).in_(old))
                .with_for_update(skip_locked=True)
            )
            mine = [(row.kind, row.sha256) for row in session.execute(free)]
            if mine:
                session.execute(
                    update(ArtefactRow)
                    .where(tuple_(ArtefactRow.kind, ArtefactRow.sha256).in_(mine))
                    .values(used_at=now)
                    .execution_options(synchronize_session=False)
                )


def find_artefact(database: Database, kind: ArtefactKind, sha256: str) -> Artefact | None:
    """The upload's record, or None if its bytes never came whole."""
    with database.read() as session:
        row = session.get(ArtefactRow, (kind, sha256))
    return None if row is None else _view(row)


def record_artefact(database: Database, kind: ArtefactKind, sha256: str, size_bytes: int) -> Artefact:
    """Record an upload whose bytes are stored; uploading the same bytes twice at once is no error."""
    row = ArtefactRow(kind=kind, sha256=sha256, size_bytes=size_bytes, created_at=datetime.now(UTC))
    try:
        with database.write() as session:
            session.add(row)
    except IntegrityError:
        found = find_artefact(database, kind, sha256)
        if found is not None:
            return found
        raise
    return _view(row)


def _view(row: ArtefactRow) -> Artefact:
    return Artefact.model_validate(
        {"sha256": row.sha256, "kind": row.kind, "size_bytes": row.size_bytes, "created_at": row.created_at}
    )
