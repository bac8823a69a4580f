"""What the store has and no record names: found by looking at all of it.

Only what is a day old counts: bytes come before their records.
"""

import time
from collections import Counter
from collections.abc import Iterable

from sqlalchemy import select

from curvature_protocol.artefacts import SINGULAR
from curvature_protocol.names import ADMITTED, RESULTS
from curvature_state.database import Database
from curvature_state.leftovers import find_leftovers, owner_of, remove_leftovers
from curvature_state.objects import ObjectStore, StoredObject
from curvature_state.removals import RESULT, Removed, clear_removals, note_removals
from curvature_state.retention import Report, report_of
from curvature_state.tables import ArtefactRow, JobRow, RemovalRow, ResultUseRow
from curvature_state.uses import in_parts

AGE_SECONDS = 24 * 3600
_OPENED = ("models", "losses")
_KINDS = {RESULT: "results"}


def tidy(database: Database, objects: ObjectStore, *, orphans: bool = False, dry_run: bool = False) -> Report:
    """Remove what attempts that came to nothing left, and admitted forms of uploads that are gone.

    Args:
        database: the records.
        objects: the store.
        orphans: whether results and uploads without a record go, too. Not without being asked: a store may be older
            than the database that it is looked at with.
        dry_run: whether this only tells what would go.
    """
    before = time.time() - AGE_SECONDS
    leftovers = find_leftovers(database, objects, before)
    admitted = _admitted_of_nothing(database, objects, before)
    unknown = _find_orphans(database, objects, before) if orphans else []
    if not dry_run:
        remove_leftovers(database, objects, before)
        for file in admitted:
            objects.delete(file.key)
        with database.write() as session:
            note_removals(session, unknown)
        if unknown:
            clear_removals(database, objects)
    return report_of(
        [
            *(("files", "of attempts that came to nothing", file.size_bytes) for file in leftovers),
            *(("files", "admitted, of uploads that are gone", file.size_bytes) for file in admitted),
            *(
                (_KINDS.get(removed.what, removed.what), "no record names them", removed.size_bytes)
                for removed in unknown
            ),
        ]
    )


def _admitted_of_nothing(database: Database, objects: ObjectStore, before: float) -> list[StoredObject]:
    """Admitted forms whose uploads have no record."""
    old = [file for file in objects.walk(ADMITTED) if file.changed_at < before]
    known = _known_uploads(database, {_name(file) for file in old})
    return [file for file in old if not any((kind, _name(file)) in known for kind in _OPENED)]


def _find_orphans(database: Database, objects: ObjectStore, before: float) -> list[Removed]:
    """Results of jobs that have no record and that nobody uses, and uploads that have none."""
    results: Counter[str] = Counter()
    young: set[str] = set()
    for file in objects.walk(RESULTS):
        if (owner := owner_of(file.key)) is not None:
            results[owner[0]] += file.size_bytes
            young |= {owner[0]} if file.changed_at >= before else set()
    unknown = set(results) - young - _known_results(database, results)
    found = [Removed(RESULT, job_id, results[job_id]) for job_id in sorted(unknown)]
    for kind in SINGULAR:
        old = {_name(file): file.size_bytes for file in objects.walk(kind) if file.changed_at < before}
        known = _known_uploads(database, old)
        found += [Removed(kind, sha256, size) for sha256, size in old.items() if (kind, sha256) not in known]
    return found


def _known_results(database: Database, job_ids: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for some in in_parts(job_ids):
        with database.read() as session:
            for column in (JobRow.id, RemovalRow.name, ResultUseRow.source_id):
                found.update(session.scalars(select(column).where(column.in_(some))))
    return found


def _known_uploads(database: Database, names: Iterable[str]) -> set[tuple[str, str]]:
    """(kind, SHA-256) of those that have a record, or had one and are about to be removed."""
    found: set[tuple[str, str]] = set()
    for some in in_parts(names):
        with database.read() as session:
            uploads = select(ArtefactRow.kind, ArtefactRow.sha256).where(ArtefactRow.sha256.in_(some))
            leaving = select(RemovalRow.what, RemovalRow.name).where(RemovalRow.name.in_(some))
            found.update((kind, name) for query in (uploads, leaving) for kind, name in session.execute(query))
    return found


def _name(file: StoredObject) -> str:
    return file.key.split("/")[1]
