"""The second half of every removal: what the records do not name any more goes from the store.

The first half, one transaction, takes something out of the records and notes here what is left to do, so that whoever
dies in between loses nothing and leaves nothing. Keys of results are never used again; an upload may come back, and its
bytes are removed under a lock on the note, which the record of the upload that came back takes away.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, select, true, tuple_
from sqlalchemy.orm import Session

from curvature_protocol.names import ADMITTED, artefact_key, result_prefix
from curvature_state.database import Database, insert_new
from curvature_state.objects import ObjectStore
from curvature_state.tables import ArtefactRow, RemovalRow, ResultUseRow
from curvature_state.uses import in_parts

RESULT, SWEEP = "result", "sweep"
ALL_ATTEMPTS = 0
_PER_ROUND = 200
_OPENED = ("models", "losses")
"""Kinds of uploads that workers admit before they open them."""


@dataclass(frozen=True)
class Removed:
    """Something that left the records.

    Attributes:
        what: "result" or a kind of upload.
        name: the job's id, or the SHA-256.
        attempt: of a result whose job stays.
    """

    what: str
    name: str
    size_bytes: int
    attempt: int = ALL_ATTEMPTS


def note_removals(session: Session, removed: Iterable[Removed]) -> None:
    """Have bytes removed once the transaction is committed."""
    now = datetime.now(UTC)
    rows = [
        {"what": r.what, "name": r.name, "attempt": r.attempt, "size_bytes": r.size_bytes, "removed_at": now}
        for r in removed
    ]
    insert_new(session, RemovalRow, rows)


def find_removals(database: Database, gone: Collection[str] = ()) -> list[Removed]:
    """What could be removed from the store now; `gone` are jobs whose results do not count as users any more."""
    with database.read() as session:
        notes = session.scalars(select(RemovalRow).where(RemovalRow.what != SWEEP)).all()
        of_results = {note.name for note in notes if note.what == RESULT}
        uses = session.execute(
            select(ResultUseRow.source_id, ResultUseRow.job_id)
            .join(RemovalRow, RemovalRow.name == ResultUseRow.source_id)
            .where(RemovalRow.what == RESULT)
        ).all()
    used = {use.source_id for use in uses if use.job_id not in gone}
    return [
        Removed(note.what, note.name, note.size_bytes, note.attempt)
        for note in notes
        if note.name not in of_results or note.name not in used
    ]


def clear_removals(database: Database, objects: ObjectStore, only: Collection[str] | None = None) -> list[Removed]:
    """Remove from the store what left the records, but what results still use; returns what was removed.

    Args:
        database: the records.
        objects: the store.
        only: jobs' ids and hashes; None: all.
    """
    parts = [true()] if only is None else [RemovalRow.name.in_(some) for some in in_parts(only)]
    done: list[Removed] = []
    for these in parts:
        while cleared := _clear_results(database, objects, these):
            done += cleared
        with database.read() as session:
            notes = session.scalars(select(RemovalRow).where(RemovalRow.what.not_in((RESULT, SWEEP)), these)).all()
        for note in notes:
            if _clear_upload(database, objects, note.what, note.name):
                done.append(Removed(note.what, note.name, note.size_bytes))
    return done


def _clear_results(database: Database, objects: ObjectStore, these: ColumnElement[bool]) -> list[Removed]:
    unused = ~exists().where(ResultUseRow.source_id == RemovalRow.name)
    query = select(RemovalRow.name, RemovalRow.attempt, RemovalRow.size_bytes).where(
        RemovalRow.what == RESULT, unused, these
    )
    with database.read() as session:
        found = session.execute(query.limit(_PER_ROUND)).all()
    for note in found:
        objects.delete_below(result_prefix(note.name, note.attempt or None))
    return [Removed(RESULT, n.name, n.size_bytes, n.attempt) for n in _strike(database, found)]


def _strike(database: Database, found: Sequence[Any]) -> Sequence[Any]:
    """Take notes away; returns those that nobody else was faster with."""
    if not found:
        return []
    mine = tuple_(RemovalRow.name, RemovalRow.attempt).in_([(note.name, note.attempt) for note in found])
    query = delete(RemovalRow).where(RemovalRow.what == RESULT, mine)
    with database.write() as session:
        return session.execute(
            query.returning(RemovalRow.name, RemovalRow.attempt, RemovalRow.size_bytes).execution_options(
                synchronize_session=False
            )
        ).all()


def _clear_upload(database: Database, objects: ObjectStore, kind: str, sha256: str) -> bool:
    """Remove an upload's bytes, unless it came back; whoever records it anew waits for the end of this transaction."""
    key = (kind, sha256, ALL_ATTEMPTS)
    with database.write() as session:
        note = session.get(RemovalRow, key, with_for_update={"skip_locked": True})
        if note is None:
            return False
        came_back = session.get(ArtefactRow, (kind, sha256)) is not None
        if not came_back:
            objects.delete(artefact_key(kind, sha256))
            others = [(other, sha256) for other in _OPENED]
            opened = select(ArtefactRow.kind).where(tuple_(ArtefactRow.kind, ArtefactRow.sha256).in_(others))
            if kind in _OPENED and session.scalar(opened.limit(1)) is None:
                objects.delete_below(f"{ADMITTED}/{sha256}")
        session.delete(note)
        return not came_back
