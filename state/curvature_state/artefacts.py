"""Records of uploads."""

import logging
from collections.abc import Collection
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, and_, delete, exists, select, tuple_, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from curvature_protocol.artefacts import Artefact, ArtefactKind
from curvature_protocol.names import artefact_key
from curvature_state.database import Database
from curvature_state.objects import ObjectStore
from curvature_state.tables import ArtefactRow, JobArtefactRow, JobRow, RemovalRow, UploadRow

logger = logging.getLogger("curvature.state")

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


def hold_artefacts_of(session: Session, *jobs: ColumnElement[bool]) -> None:
    """`hold_artefacts` of what jobs that are there (and locked) refer to.

    Raises:
        ArtefactMissing: one is gone.
    """
    rows = select(JobArtefactRow.kind, JobArtefactRow.sha256).join(JobRow, JobRow.id == JobArtefactRow.job_id)
    found = session.execute(rows.where(*jobs).distinct()).all()
    hold_artefacts(session, [(cast("ArtefactKind", row.kind), row.sha256) for row in found])


def use_artefact(database: Database, kind: ArtefactKind, sha256: str) -> Artefact | None:
    """`find_artefact` for somebody who is about to ask for it in a job: its age counts from now, to the minute."""
    stale = datetime.now(UTC) - timedelta(seconds=USED_PRECISION_SECONDS)
    with database.read() as session:
        row = session.get(ArtefactRow, (kind, sha256))
    if row is None or (row.used_at or row.created_at) >= stale:
        return None if row is None else view(row)
    with database.write() as session:
        row = session.get(ArtefactRow, (kind, sha256), with_for_update=True)
        if row is not None:
            row.used_at = datetime.now(UTC)
    return None if row is None else view(row)


def find_artefact(database: Database, kind: ArtefactKind, sha256: str) -> Artefact | None:
    """The upload's record, or None if its bytes never came whole."""
    with database.read() as session:
        row = session.get(ArtefactRow, (kind, sha256))
    return None if row is None else view(row)


def record_artefact(database: Database, kind: ArtefactKind, sha256: str, size_bytes: int) -> Artefact:
    """Record an upload whose bytes are stored and right; uploading the same bytes twice at once is no error.

    It stays unverified while a direct upload of the same hash may yet put other bytes into its place. Where the same
    upload was just removed, its bytes may have gone before this: look for them afterwards.
    """
    while True:
        with suppress(IntegrityError):
            return _add(database, kind, sha256, size_bytes, verified=True)
        with database.write() as session:
            session.execute(
                update(ArtefactRow)
                .where(_is(kind, sha256), ArtefactRow.verified.is_(False), ~_is_being_replaced(kind, sha256))
                .values(verified=True, size_bytes=size_bytes)
            )
        if (found := find_artefact(database, kind, sha256)) is not None:  # else it was removed at this moment
            return found


def announce_artefact(database: Database, kind: ArtefactKind, sha256: str, size_bytes: int) -> bool:
    """Record an upload whose bytes nobody has hashed, before they get their place; False if there is a record."""
    try:
        _add(database, kind, sha256, size_bytes, verified=False)
    except IntegrityError:
        return False
    return True


def _add(database: Database, kind: ArtefactKind, sha256: str, size_bytes: int, *, verified: bool) -> Artefact:
    row = ArtefactRow(
        kind=kind, sha256=sha256, size_bytes=size_bytes, created_at=datetime.now(UTC), verified=verified, pinned=False
    )
    leaving = delete(RemovalRow).where(RemovalRow.what == kind, RemovalRow.name == sha256)
    with database.write() as session:
        session.add(row)
        session.flush()
        # What was removed and came back stays. Whoever removes its bytes at this moment is waited for; and in this
        # order, whoever is about to note their removal.
        session.execute(leaving.execution_options(synchronize_session=False))
    return view(row)


def confirm_artefact(database: Database, kind: ArtefactKind, sha256: str) -> None:
    """The stored bytes were hashed and found right."""
    with database.read() as session:
        row = session.get(ArtefactRow, (kind, sha256))
    if row is None or row.verified:
        return
    with database.write() as session:
        session.execute(
            update(ArtefactRow).where(_is(kind, sha256), ~_is_being_replaced(kind, sha256)).values(verified=True)
        )


def judge_artefact(database: Database, objects: ObjectStore, kind: ArtefactKind, sha256: str, right: bool) -> None:
    """Take notice of what somebody found who hashed the stored bytes: wrong ones go, to be uploaded again.

    Where the record cannot be written, the next one who hashes them says the same.
    """
    try:
        if right:
            confirm_artefact(database, kind, sha256)
        elif (artefact := find_artefact(database, kind, sha256)) is not None and forget_artefact(database, artefact):
            objects.delete(artefact_key(kind, sha256))
    except SQLAlchemyError as error:
        logger.warning("what was found of %s/%s could not be written down: %s", kind, sha256, error)


def forget_artefact(database: Database, artefact: Artefact) -> bool:
    """Remove a record whose bytes are lost or wrong, so that they can be uploaded again; False if it is another now."""
    with database.write() as session:
        same = ArtefactRow.created_at == artefact.created_at
        done = session.execute(delete(ArtefactRow).where(_is(artefact.kind, artefact.sha256), same))
        return cast("CursorResult[Any]", done).rowcount > 0


def _is(kind: ArtefactKind, sha256: str) -> ColumnElement[bool]:
    return and_(ArtefactRow.kind == kind, ArtefactRow.sha256 == sha256)


def _is_being_replaced(kind: ArtefactKind, sha256: str) -> ColumnElement[bool]:
    """Whether a direct upload is about to be given the artefact's place."""
    return exists().where(
        UploadRow.kind == kind,
        UploadRow.sha256 == sha256,
        UploadRow.store_id.is_not(None),
        UploadRow.assembling_until.is_not(None),
    )


def view(row: ArtefactRow) -> Artefact:
    """The row as the API shows it."""
    return Artefact.model_validate(
        {
            "sha256": row.sha256,
            "kind": row.kind,
            "size_bytes": row.size_bytes,
            "created_at": row.created_at,
            "verified": row.verified,
            "pinned": row.pinned,
        }
    )
