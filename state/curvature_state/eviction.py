"""What is to go by a policy: found by reading alone, so that a dry run tells what a real one would do.

What others use goes after them: a result after those that refer to its files. Everything is checked once more, under
locks, when it is removed.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, exists, func, or_, select, tuple_
from sqlalchemy.orm import Session, aliased

from curvature_protocol.jobs import FINAL, JobKind, JobStatus
from curvature_state.dropping import HAS_RESULT, OVER, UNFINISHED, UNPINNED
from curvature_state.policy import TARGET_SHARE, Policy
from curvature_state.removals import RESULT, SWEEP
from curvature_state.tables import ArtefactRow, JobArtefactRow, JobRow, RemovalRow, ResultUseRow, SweepRow
from curvature_state.uses import in_parts
from curvature_state.victims import Removals, Victim

job_used_at: ColumnElement[Any] = func.coalesce(JobRow.used_at, JobRow.finished_at)
artefact_used_at: ColumnElement[Any] = func.coalesce(ArtefactRow.used_at, ArtefactRow.created_at)
KINDS = {JobKind.PLAN: "plans", JobKind.INSPECTION: "inspections", JobKind.ANALYSIS: "jobs"}


def find_victims(session: Session, policy: Policy, now: datetime, settled_bytes: int = 0) -> Removals:
    """What is to go now.

    Args:
        session: read alone.
        policy: the limits.
        now: what ages are counted to.
        settled_bytes: what the store has and does not count, since it goes anyway.
    """
    found = Removals(_kept_for_others(session))
    _add_of_deleted_sweeps(session, found, now)
    if policy.keep_jobs is not None:
        _add_jobs(session, found, now - policy.keep_jobs, policy.keep_jobs)
    if policy.keep_plans is not None:
        _add_plans(session, found, now - policy.keep_plans, policy.keep_plans)
    if policy.keep_results is not None:
        _add_results(session, found, now - policy.keep_results, policy.keep_results)
    if policy.keep_uploads is not None:
        _add_uploads(session, found, now - policy.keep_uploads, policy.keep_uploads)
    if policy.max_stored_bytes is not None:
        _add_least_used(session, found, policy.max_stored_bytes, now - policy.grace, settled_bytes)
    return found


def stored_bytes(session: Session) -> int:
    """What uploads and results weigh, those included that left the records and not yet the store."""
    columns = (ArtefactRow.size_bytes, JobRow.result_bytes, RemovalRow.size_bytes)
    return sum(int(session.scalar(select(func.coalesce(func.sum(column), 0))) or 0) for column in columns)


# By age


def _add_of_deleted_sweeps(session: Session, found: Removals, now: datetime) -> None:
    deleted = select(RemovalRow.name).where(RemovalRow.what == SWEEP)
    _add_whole_jobs(session, found, _jobs(JobRow.sweep_id.in_(deleted)), now, "of a deleted sweep")


def _add_jobs(session: Session, found: Removals, before: datetime, kept: timedelta) -> None:
    """Analyses with their shards; those of a sweep when all of it is old enough."""
    other = aliased(JobRow)
    young = or_(other.status.in_(UNFINISHED), other.pinned.is_(True), other.finished_at >= before)
    sweeps = select(SweepRow.id).where(
        SweepRow.created_at < before, ~exists().where(other.sweep_id == SweepRow.id, young)
    )
    found.sweeps = list(session.scalars(sweeps.order_by(SweepRow.id)))
    whole = or_(JobRow.sweep_id.is_(None), JobRow.sweep_id.in_(sweeps))
    jobs = _jobs(JobRow.kind == JobKind.ANALYSIS, JobRow.finished_at < before, whole)
    _add_whole_jobs(session, found, jobs, before, f"over for {days(kept)}")


def _add_plans(session: Session, found: Removals, before: datetime, kept: timedelta) -> None:
    plans = _jobs(JobRow.kind.in_((JobKind.PLAN, JobKind.INSPECTION)), job_used_at < before)
    _add_whole_jobs(session, found, plans, before, _unused(kept))


def _add_whole_jobs(session: Session, found: Removals, jobs: Any, before: datetime, why: str) -> None:
    rows = [row for row in session.execute(jobs).all() if row.id not in found.gone]
    shards: dict[str, list[Any]] = defaultdict(list)
    for some in in_parts(row.id for row in rows if row.parts is not None):
        columns = (JobRow.id, JobRow.parent_id, JobRow.status, JobRow.pinned, JobRow.result_bytes)
        for shard in session.execute(select(*columns).where(JobRow.parent_id.in_(some))):
            shards[shard.parent_id or ""].append(shard)
    leaving = []
    for row in rows:
        mine = shards[row.id]
        if not any(shard.pinned or shard.status not in FINAL for shard in mine):
            sizes = {each.id: each.result_bytes or 0 for each in (row, *mine)}
            leaving.append((Victim(KINDS[row.kind], row.id, 0, why, before), sizes))
    found.add_jobs(leaving, _users_of(session, [job_id for _, sizes in leaving for job_id in sizes]))


def _add_results(session: Session, found: Removals, before: datetime, kept: timedelta) -> None:
    old = session.execute(_evictable(job_used_at < before)).all()
    pending = {row.id: row.result_bytes for row in old if row.id not in found.gone}
    users = _users_of(session, pending)
    while free := [job_id for job_id in pending if users[job_id] <= found.gone]:
        for job_id in free:
            victim = Victim("results", job_id, pending.pop(job_id), _unused(kept), before)
            found.add_result(victim, users[job_id])


def _add_uploads(session: Session, found: Removals, before: datetime, kept: timedelta) -> None:
    for row in session.execute(_unneeded(artefact_used_at < before)):
        found.add_upload(Victim(row.kind, row.sha256, row.size_bytes, _unused(kept), before))


# By size


def _add_least_used(session: Session, found: Removals, most_bytes: int, before: datetime, settled_bytes: int) -> None:
    """Results and uploads in the order of their last use, until what is left is small enough.

    A result that others use is passed over, and goes right after the last of them if that goes.
    """
    stored = stored_bytes(session) - settled_bytes
    if stored - found.freed_bytes <= most_bytes:
        return
    why = f"more than {most_bytes} bytes in all"
    results = [row for row in session.execute(_evictable(job_used_at <= before)) if row.id not in found.gone]
    victims = {row.id: Victim("results", row.id, row.result_bytes, why, before) for row in results}
    users, sources = _users_of(session, victims), _sources_of(session, victims)
    uploads = session.execute(_unneeded(artefact_used_at <= before))
    passed_over: set[str] = set()

    def evict(job_id: str) -> None:
        found.add_result(victims[job_id], users[job_id])
        for source in sorted(sources[job_id] & passed_over):
            if users[source] <= found.gone and source not in found.gone:
                evict(source)

    for _, kind, name, size in heapq.merge(
        ((row.last_used_at, "results", row.id, row.result_bytes) for row in results),
        ((row.last_used_at, row.kind, row.sha256, row.size_bytes) for row in uploads),
    ):
        if stored - found.freed_bytes <= TARGET_SHARE * most_bytes:
            return
        if kind == "results":
            if users[name] <= found.gone:
                evict(name)
            else:
                passed_over.add(name)
        elif not found.has_upload(kind, name):
            found.add_upload(Victim(kind, name, size, why, before))


def _kept_for_others(session: Session) -> dict[str, tuple[int, set[str]]]:
    """Deleted job → (bytes, users), of those whose files others' results use."""
    query = select(RemovalRow.name, RemovalRow.size_bytes, ResultUseRow.job_id).where(RemovalRow.what == RESULT)
    found: dict[str, tuple[int, set[str]]] = {}
    for name, size, user in session.execute(query.join(ResultUseRow, ResultUseRow.source_id == RemovalRow.name)):
        found.setdefault(name, (size, set()))[1].add(user)
    return found


# What may go


def _jobs(*which: ColumnElement[bool]) -> Any:
    """Jobs that are over."""
    query = select(JobRow.id, JobRow.kind, JobRow.parts, JobRow.result_bytes)
    return query.where(OVER, UNPINNED, *which).order_by(JobRow.finished_at, JobRow.id)


def _evictable(*which: ColumnElement[bool]) -> Any:
    """Results that no unfinished job needs, the least used first; others' results may use them."""
    parent = aliased(JobRow)
    idle = exists().where(parent.id == JobRow.parent_id, parent.status.in_(FINAL), parent.pinned.is_(False))
    query = select(JobRow.id, JobRow.result_bytes, job_used_at.label("last_used_at")).where(
        JobRow.kind.in_((JobKind.ANALYSIS, JobKind.SHARD)),
        JobRow.status == JobStatus.SUCCEEDED,
        HAS_RESULT,
        UNPINNED,
        or_(JobRow.parent_id.is_(None), idle),
        *which,
    )
    return query.order_by(job_used_at, JobRow.id)


def _unneeded(*which: ColumnElement[bool]) -> Any:
    """Uploads that no unfinished job refers to, the least used first."""
    needed = (
        select(JobArtefactRow.kind, JobArtefactRow.sha256)
        .join(JobRow, JobRow.id == JobArtefactRow.job_id)
        .where(JobRow.status.in_(UNFINISHED))
    )
    columns = (ArtefactRow.kind, ArtefactRow.sha256, ArtefactRow.size_bytes, artefact_used_at.label("last_used_at"))
    query = select(*columns).where(
        ArtefactRow.pinned.is_(False), tuple_(ArtefactRow.kind, ArtefactRow.sha256).not_in(needed), *which
    )
    return query.order_by(artefact_used_at, ArtefactRow.kind, ArtefactRow.sha256)


def _users_of(session: Session, job_ids: Iterable[str]) -> dict[str, set[str]]:
    """Job → those whose results use its files."""
    found: dict[str, set[str]] = defaultdict(set)
    for some in in_parts(job_ids):
        for row in session.execute(select(ResultUseRow).where(ResultUseRow.source_id.in_(some))).scalars():
            found[row.source_id].add(row.job_id)
    return found


def _sources_of(session: Session, job_ids: Iterable[str]) -> dict[str, set[str]]:
    """Job → those whose files its result uses."""
    found: dict[str, set[str]] = defaultdict(set)
    for some in in_parts(job_ids):
        for row in session.execute(select(ResultUseRow).where(ResultUseRow.job_id.in_(some))).scalars():
            found[row.job_id].add(row.source_id)
    return found


def days(time: timedelta) -> str:
    """A time in words."""
    count = time.total_seconds() / 86400
    return f"{count:g} day{'' if count == 1 else 's'}"


def _unused(kept: timedelta) -> str:
    return f"not used for {days(kept)}"
