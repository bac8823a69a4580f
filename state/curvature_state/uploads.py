"""Records of large uploads: one per tenant, kind and hash, found again by whoever goes on with it.

An upload receives parts, is assembled by one process at a time (which holds it by a lease), and finishes or fails. A
record stays for a day after the last sign of life, so that a client that missed the answer gets it again.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from sqlalchemy import CursorResult, delete, null, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from curvature_protocol.artefacts import ArtefactKind
from curvature_protocol.errors import Problem
from curvature_protocol.names import UPLOADS, upload_key
from curvature_protocol.uploads import UploadPart
from curvature_state.database import Database
from curvature_state.objects import ObjectStore
from curvature_state.tables import UploadPartRow, UploadRow

KEPT_SECONDS = 24 * 3600
ASSEMBLY_LEASE_SECONDS = 30.0
_TOUCH_PRECISION_SECONDS = 60.0
_ARTEFACTS: tuple[ArtefactKind, ...] = ("models", "batches", "losses")


@dataclass(frozen=True)
class UploadRecord:
    """A row of the table."""

    id: str
    tenant: str
    kind: ArtefactKind
    sha256: str
    size_bytes: int
    part_bytes: int
    store_id: str | None
    touched_at: datetime
    assembling: bool
    finished: bool
    failure: Problem | None

    @property
    def count(self) -> int:
        """How many parts it has."""
        return -(-self.size_bytes // self.part_bytes)

    @property
    def expires_at(self) -> datetime:
        """When it is given up if nothing comes any more."""
        return self.touched_at + timedelta(seconds=KEPT_SECONDS)

    def size_of(self, number: int) -> int:
        """The size of a part, counted from 1."""
        return min(self.part_bytes, self.size_bytes - (number - 1) * self.part_bytes)


@dataclass(frozen=True)
class NewUpload:
    """What is known of an upload before it has a row."""

    tenant: str
    kind: ArtefactKind
    sha256: str
    size_bytes: int
    part_bytes: int


def new_upload_id() -> str:
    """An id that no upload has."""
    return uuid.uuid4().hex


def find_upload(database: Database, tenant: str, upload_id: str) -> UploadRecord | None:
    """A tenant's upload."""
    with database.read() as session:
        row = session.get(UploadRow, upload_id)
    return None if row is None or row.tenant != tenant else _record(row)


def find_upload_of(database: Database, tenant: str, kind: ArtefactKind, sha256: str) -> UploadRecord | None:
    """A tenant's upload of these bytes."""
    query = select(UploadRow).where(UploadRow.tenant == tenant, UploadRow.kind == kind, UploadRow.sha256 == sha256)
    with database.read() as session:
        row = session.scalar(query)
    return None if row is None else _record(row)


def create_upload(database: Database, new: NewUpload, upload_id: str, store_id: str | None) -> UploadRecord | None:
    """Write a row; None if there is one of these bytes."""
    now = datetime.now(UTC)
    row = UploadRow(
        id=upload_id,
        tenant=new.tenant,
        kind=new.kind,
        sha256=new.sha256,
        size_bytes=new.size_bytes,
        part_bytes=new.part_bytes,
        store_id=store_id,
        created_at=now,
        touched_at=now,
    )
    try:
        with database.write() as session:
            session.add(row)
    except IntegrityError:
        return None
    return _record(row)


def remove_upload(database: Database, objects: ObjectStore, record: UploadRecord) -> None:
    """Forget an upload and what came of it."""
    with database.write() as session:
        session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == record.id))
        session.execute(delete(UploadRow).where(UploadRow.id == record.id))
    remove_upload_bytes(objects, record)


def remove_upload_bytes(objects: ObjectStore, record: UploadRecord) -> None:
    """Remove what is stored of an upload under its own keys."""
    if record.store_id is not None and objects.bucket is not None:
        objects.bucket.abort(upload_key(record.id), record.store_id)
        objects.delete(upload_key(record.id))
    else:
        objects.delete_below(upload_key(record.id))


def touch_upload(database: Database, record: UploadRecord) -> None:
    """Note that somebody goes on with it, to the minute."""
    if datetime.now(UTC) - record.touched_at > timedelta(seconds=_TOUCH_PRECISION_SECONDS):
        with database.write() as session:
            _set(session, record.id, touched_at=datetime.now(UTC))


# Parts that come through the API


def list_parts(database: Database, upload_id: str) -> list[UploadPart]:
    """The parts that have arrived, in order."""
    query = select(UploadPartRow).where(UploadPartRow.upload_id == upload_id).order_by(UploadPartRow.number)
    with database.read() as session:
        rows = session.scalars(query).all()
    return [UploadPart(number=row.number, size_bytes=row.size_bytes, sha256=row.sha256) for row in rows]


def find_part(database: Database, upload_id: str, number: int) -> UploadPart | None:
    """A part, if it has arrived."""
    with database.read() as session:
        row = session.get(UploadPartRow, (upload_id, number))
    return None if row is None else UploadPart(number=row.number, size_bytes=row.size_bytes, sha256=row.sha256)


def record_part(database: Database, upload_id: str, part: UploadPart) -> bool:
    """Record a part whose bytes are stored; False if its upload is gone."""
    with database.write() as session:
        if not _set(session, upload_id, touched_at=datetime.now(UTC)):
            return False
        session.merge(
            UploadPartRow(upload_id=upload_id, number=part.number, sha256=part.sha256, size_bytes=part.size_bytes)
        )
    return True


def forget_part(database: Database, upload_id: str, number: int) -> None:
    """A part's bytes were lost from the store."""
    with database.write() as session:
        session.execute(
            delete(UploadPartRow).where(UploadPartRow.upload_id == upload_id, UploadPartRow.number == number)
        )


# Assembling


def claim_assembly(database: Database, upload_id: str) -> bool:
    """Take it upon this process to put the parts together; False if another does, or it is over."""
    now = datetime.now(UTC)
    free = or_(UploadRow.assembling_until.is_(None), UploadRow.assembling_until < now)
    query = update(UploadRow).where(
        UploadRow.id == upload_id, free, UploadRow.finished_at.is_(None), UploadRow.failure.is_(None)
    )
    with database.write() as session:
        done = session.execute(query.values(assembling_until=_lease_end(), touched_at=now))
        return _count(done) > 0


def renew_assembly(database: Database, upload_id: str) -> None:
    """Say that this process still puts the parts together."""
    with database.write() as session:
        _set(session, upload_id, assembling_until=_lease_end(), touched_at=datetime.now(UTC))


def release_assembly(database: Database, upload_id: str, failure: Problem | None = None) -> None:
    """Stop putting the parts together, for others to take up, or because it failed for good."""
    with database.write() as session:
        told = null() if failure is None else failure.model_dump(exclude_none=True)
        _set(session, upload_id, assembling_until=None, failure=told)


def finish_upload(database: Database, upload_id: str) -> None:
    """The artefact is recorded: only the record of the upload stays, for those who ask again."""
    with database.write() as session:
        _set(session, upload_id, assembling_until=None, finished_at=datetime.now(UTC), touched_at=datetime.now(UTC))
        session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id == upload_id))


# Giving up


def remove_stale_uploads(database: Database, objects: ObjectStore, before: float) -> int:
    """Give up uploads without a sign of life since a POSIX time; returns how many there were.

    Besides, remove what no upload names, and what processes that were killed while they wrote left in the store.
    """
    stale = list(_stale(database, datetime.fromtimestamp(before, UTC)))
    for record in stale:
        remove_upload(database, objects, record)
    with database.read() as session:
        kept = [upload_key(upload_id) for upload_id in session.scalars(select(UploadRow.id))]
    objects.delete_older(UPLOADS, before, kept)
    for kind in _ARTEFACTS:
        objects.delete_torn(kind, before)
    return len(stale)


def _stale(database: Database, before: datetime) -> Iterator[UploadRecord]:
    with database.read() as session:
        rows = session.scalars(select(UploadRow).where(UploadRow.touched_at < before)).all()
    yield from map(_record, rows)


def _set(session: Session, upload_id: str, **values: Any) -> bool:
    """Change a row; False if there is none."""
    return _count(session.execute(update(UploadRow).where(UploadRow.id == upload_id).values(**values))) > 0


def _count(done: object) -> int:
    return cast("CursorResult[Any]", done).rowcount


def _lease_end() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=ASSEMBLY_LEASE_SECONDS)


def _record(row: UploadRow) -> UploadRecord:
    until = row.assembling_until
    return UploadRecord(
        id=row.id,
        tenant=row.tenant,
        kind=cast("ArtefactKind", row.kind),
        sha256=row.sha256,
        size_bytes=row.size_bytes,
        part_bytes=row.part_bytes,
        store_id=row.store_id,
        touched_at=row.touched_at,
        assembling=until is not None and until > datetime.now(UTC),
        finished=row.finished_at is not None,
        failure=None if row.failure is None else Problem.model_validate(row.failure),
    )
