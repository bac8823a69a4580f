"""Stored results that no job names: of attempts that ended, or whose worker was killed, between storing and commit."""

from collections.abc import Iterator, Sequence
from itertools import islice

from sqlalchemy import select

from curvature_protocol.jobs import JobStatus
from curvature_protocol.names import RESULTS
from curvature_state.database import Database
from curvature_state.objects import ObjectStore, StoredObject
from curvature_state.tables import JobRow

_JOBS_PER_QUERY = 500
_MAY_NAME = (JobStatus.RUNNING, JobStatus.CANCELLING, JobStatus.SUCCEEDED)
"""States whose attempt has a result, or is about to. An attempt that left them never comes back to them."""


def remove_leftovers(database: Database, objects: ObjectStore, before: float) -> int:
    """Remove result files of attempts that the job's row does not name, last changed before a POSIX time.

    Files of jobs that have no row stay: a store may be older than the database that it is looked at with.

    Returns: how many files were removed.
    """
    leftovers = find_leftovers(database, objects, before)
    for file in leftovers:
        objects.delete(file.key)
    objects.delete_torn(RESULTS, before)
    return len(leftovers)


def find_leftovers(database: Database, objects: ObjectStore, before: float) -> list[StoredObject]:
    """What `remove_leftovers` would remove."""
    old = (file for file in objects.walk(RESULTS) if file.changed_at < before)
    return [file for part in _parts(old) for file in _unnamed(database, part)]


def _parts(files: Iterator[StoredObject]) -> Iterator[list[StoredObject]]:
    while part := list(islice(files, _JOBS_PER_QUERY)):
        yield part


def _unnamed(database: Database, files: Sequence[StoredObject]) -> list[StoredObject]:
    """Those of the files that belong to attempts which their jobs do not name."""
    owners = {file: owner for file in files if (owner := owner_of(file.key)) is not None}
    query = select(JobRow.id, JobRow.attempt, JobRow.status).where(JobRow.id.in_({job for job, _ in owners.values()}))
    with database.read() as session:
        rows = {row.id: row for row in session.execute(query)}
    return [
        file
        for file, (job_id, attempt) in owners.items()
        if (row := rows.get(job_id)) is not None and not (row.attempt == attempt and row.status in _MAY_NAME)
    ]


def owner_of(key: str) -> tuple[str, int] | None:
    """(job id, attempt) of a result's key; None for a key of another form."""
    parts = key.split("/")
    return (parts[1], int(parts[2])) if len(parts) == 4 and parts[2].isdecimal() else None
