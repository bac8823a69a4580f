"""Records of uploads."""

from datetime import UTC, datetime

from sqlalchemy.exc import IntegrityError

from curvature_protocol.artefacts import Artefact, ArtefactKind
from curvature_state.database import Database
from curvature_state.tables import ArtefactRow


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
