"""The first half of every removal: jobs, results and uploads leave the records, and nothing that is needed does.

Rows are locked first and looked at afterwards: whoever comes to need something locks it as well (`hold_results`,
`hold_artefacts`), and has written that down by the time its lock goes. Rows that somebody holds are left for another
time, but where the caller locked them before.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, delete, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from curvature_protocol.jobs import FINAL, JobStatus
from curvature_state import webhooks
from curvature_state.artefacts import Reference
from curvature_state.removals import RESULT, Removed, note_removals
from curvature_state.tables import (
    ArtefactRow,
    CachedResultRow,
    JobArtefactRow,
    JobRow,
    ModelDigestRow,
    ResultUseRow,
)
from curvature_state.uses import in_parts

UNFINISHED = [status for status in JobStatus if status not in FINAL]
OVER = JobRow.status.in_(FINAL)
UNPINNED = JobRow.pinned.is_(False)
HAS_RESULT = JobRow.result_bytes.is_not(None)
_QUIET: dict[str, Any] = {"synchronize_session": False}


def drop_jobs(session: Session, job_ids: Collection[str], *conditions: ColumnElement[bool]) -> set[str]:
    """Remove jobs that are over and not pinned, with their shards; returns those that were removed, shards included."""
    query = select(JobRow.id).where(JobRow.id.in_(job_ids), JobRow.parent_id.is_(None), OVER, UNPINNED, *conditions)
    found = set(session.scalars(query.order_by(JobRow.id).with_for_update(skip_locked=True)))
    shards = session.execute(
        select(JobRow.id, JobRow.parent_id)
        .where(JobRow.parent_id.in_(found), OVER, UNPINNED)
        .order_by(JobRow.id)
        .with_for_update(skip_locked=True)
    ).all()
    mine = Counter(shard.parent_id for shard in shards)
    counts = select(JobRow.parent_id, func.count()).where(JobRow.parent_id.in_(found)).group_by(JobRow.parent_id)
    found -= {parent_id for parent_id, count in session.execute(counts).all() if count != mine[parent_id]}
    dropped = found | {shard.id for shard in shards if shard.parent_id in found}
    forget_jobs(session, dropped)
    return dropped


def forget_jobs(session: Session, job_ids: Iterable[str]) -> None:
    """Remove the rows of jobs that are locked, and all that was noted of them; their files go when nobody uses them."""
    for some in in_parts(job_ids):
        stored = session.execute(
            select(JobRow.id, JobRow.result_bytes).where(JobRow.id.in_(some), JobRow.attempt > 0)
        ).all()
        note_removals(session, [Removed(RESULT, row.id, row.result_bytes or 0) for row in stored])
        _forget_uses(session, some)
        webhooks.forget(session, some)
        for query in (
            delete(JobArtefactRow).where(JobArtefactRow.job_id.in_(some)),
            delete(JobRow).where(JobRow.id.in_(some)),
        ):
            session.execute(query.execution_options(**_QUIET))


def drop_results(session: Session, job_ids: Collection[str], *conditions: ColumnElement[bool]) -> set[str]:
    """Remove results that nobody uses and no unfinished job needs, of jobs that are not pinned; returns whose."""
    parents = select(JobRow.parent_id).where(JobRow.id.in_(job_ids), JobRow.parent_id.is_not(None))
    # A job over a data set that is taken up again needs its shards; this keeps it from being.
    idle = set(
        session.scalars(
            select(JobRow.id)
            .where(JobRow.id.in_(parents), OVER, UNPINNED)
            .order_by(JobRow.id)
            .with_for_update(read=True, skip_locked=True)
        )
    )
    free = or_(JobRow.parent_id.is_(None), JobRow.parent_id.in_(idle))
    query = select(JobRow.id, JobRow.attempt, JobRow.result_bytes).where(
        JobRow.id.in_(job_ids), JobRow.status == JobStatus.SUCCEEDED, HAS_RESULT, UNPINNED, free, *conditions
    )
    locked = session.execute(query.order_by(JobRow.id).with_for_update(skip_locked=True)).all()
    uses = select(ResultUseRow.source_id).where(ResultUseRow.source_id.in_([row.id for row in locked]))
    used = set(session.scalars(uses))
    _forget_results(session, [row for row in locked if row.id not in used])
    return {row.id for row in locked} - used


def _forget_results(session: Session, rows: Sequence[Any]) -> None:
    note_removals(session, [Removed(RESULT, row.id, row.result_bytes or 0, row.attempt) for row in rows])
    for some in in_parts(row.id for row in rows):
        _forget_uses(session, some)
        gone = update(JobRow).where(JobRow.id.in_(some)).values(result_bytes=None)
        session.execute(gone.execution_options(**_QUIET))


def _forget_uses(session: Session, job_ids: Collection[str]) -> None:
    """These results are no answers of the cache any more, and use nothing."""
    for query in (
        delete(CachedResultRow).where(CachedResultRow.job_id.in_(job_ids)),
        delete(ResultUseRow).where(ResultUseRow.job_id.in_(job_ids)),
    ):
        session.execute(query.execution_options(**_QUIET))


def drop_artefacts(
    session: Session, references: Collection[Reference], *conditions: ColumnElement[bool]
) -> set[Reference]:
    """Remove uploads that are not pinned and to which no unfinished job refers; returns which."""
    query = (
        select(ArtefactRow.kind, ArtefactRow.sha256, ArtefactRow.size_bytes)
        .where(which_artefacts(references), ArtefactRow.pinned.is_(False), *conditions)
        .order_by(ArtefactRow.kind, ArtefactRow.sha256)
        .with_for_update(skip_locked=True)
    )
    sizes: dict[Any, int] = {(kind, sha256): size for kind, sha256, size in session.execute(query)}
    needed = (
        select(JobArtefactRow.kind, JobArtefactRow.sha256)
        .join(JobRow, JobRow.id == JobArtefactRow.job_id)
        .where(tuple_(JobArtefactRow.kind, JobArtefactRow.sha256).in_(list(sizes)), JobRow.status.in_(UNFINISHED))
        .distinct()
    )
    for kind, sha256 in session.execute(needed).all():
        del sizes[kind, sha256]
    forget_artefacts(session, sizes)
    return set(sizes)


def forget_artefacts(session: Session, sizes: dict[Reference, int]) -> None:
    """Remove the rows of uploads (reference → bytes) that are locked, and what was noted of them."""
    models = [sha256 for kind, sha256 in sizes if kind == "models"]
    note_removals(session, [Removed(kind, sha256, size) for (kind, sha256), size in sizes.items()])
    for query in (
        delete(ModelDigestRow).where(ModelDigestRow.sha256.in_(models)),
        delete(ArtefactRow).where(which_artefacts(sizes)),
    ):
        session.execute(query.execution_options(**_QUIET))


def which_artefacts(references: Iterable[Reference]) -> ColumnElement[bool]:
    """The rows of uploads."""
    return tuple_(ArtefactRow.kind, ArtefactRow.sha256).in_(list(references))
