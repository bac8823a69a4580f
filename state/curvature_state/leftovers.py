"""Stored results that no job names: of attempts that ended, or whose worker was killed, between storing and commit."""

from collections.abc import Iterator, Sequence
from itertools import islice

from sqlalchemy import select

from curvature_protocol.jobs import JobStatus
from curvature_state.database import Database
from curvature_state.objects import ObjectStore
from curvature_state.tables import JobRow

_RESULTS = "results"
_JOBS_PER_QUERY = 500
_MAY_NAME = (JobStatus.RUNNING, JobStatus.CANCELLING, JobStatus.SUCCEEDED)
"""States whose attempt has a result, or is about to. An attempt that left them never comes back to them."""


def remove_leftovers(database: Database, objects: ObjectStore, before: float) -> int:
    """Remove result files of attempts that the job's row does not name, last changed before a POSIX time.

    Files of jobs that have no row stay: a store may be older than the database that it is looked at with.

    Returns: how many files were removed.
    """
    old = [key for key, changed_at in objects.list(_RESULTS) if changed_at < before]
    leftovers = [key for part in _parts(old) for key in _unnamed(database, part)]
    for key in leftovers:
        objects.delete(key)
    objects.delete_torn(_RESULTS, before)
    return len(leftovers)


def _parts(keys: Sequence[str]) -> Iterator[list[str]]:
    remaining = iter(keys)
    while part := list(islice(remaining, _JOBS_PER_QUERY)):
        yield part


def _unnamed(database: Database, keys: Sequence[str]) -> list[str]:
    """Those of the keys that belong to attempts which their jobs do not name."""
    owners = {key: owner for key in keys if (owner := _owner(key)) is not None}
    query = select(JobRow.id, JobRow.attempt, JobRow.status).where(JobRow.id.in_({job for job, _ in owners.values()}))
    with database.read() as session:
        rows = {row.id: row for row in session.execute(query)}
    return [
        key
        for key, (job_id, attempt) in owners.items()
        if (row := rows.get(job_id)) is not None and not (row.attempt == attempt and row.status in _MAY_NAME)
    ]


def _owner(key: str) -> tuple[str, int] | None:
    """(job id, attempt) of a result's key; None for a key of another form."""
    parts = key.split("/")
    return (parts[1], int(parts[2])) if len(parts) == 4 and parts[2].isdecimal() else None
