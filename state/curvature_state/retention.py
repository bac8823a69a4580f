"""Keeping to a policy: what is too old, or too much, is removed; never what a job that is not over needs.

Several processes may do this at once: each removes in small transactions what it still finds as it was.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

from sqlalchemy import delete, exists

from curvature_protocol.artefacts import SINGULAR
from curvature_protocol.jobs import JobKind
from curvature_state import webhooks
from curvature_state.artefacts import Reference
from curvature_state.database import Database
from curvature_state.deletion import settle_deleted_sweeps
from curvature_state.dropping import drop_artefacts, drop_jobs, drop_results
from curvature_state.eviction import KINDS, artefact_used_at, find_victims, job_used_at
from curvature_state.objects import ObjectStore
from curvature_state.policy import Policy
from curvature_state.removals import RESULT, clear_removals, find_removals
from curvature_state.tables import JobRow, SweepRow
from curvature_state.victims import Removals, Victim

T = TypeVar("T")

_PER_TRANSACTION = 200
_LEFT = "left from what was removed before"
_RELEASED = "of deleted jobs, and not used any more"
_EMPTY_SWEEPS = "all of their jobs are removed"


@dataclass(frozen=True, order=True)
class Line:
    """So many of a kind, for one reason."""

    kind: str
    why: str
    count: int
    size_bytes: int


@dataclass(frozen=True)
class Report:
    """What was removed, or would be."""

    lines: tuple[Line, ...] = ()

    @property
    def size_bytes(self) -> int:
        """In all."""
        return sum(line.size_bytes for line in self.lines)

    def __add__(self, other: "Report") -> "Report":
        return Report(tuple(sorted((*self.lines, *other.lines))))


def report_of(found: Iterable[tuple[str, str, int]]) -> Report:
    """Counts (kind, why, bytes)."""
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for kind, why, size_bytes in found:
        counts[kind, why] += 1
        sizes[kind, why] += size_bytes
    return Report(tuple(sorted(Line(*key, count, sizes[key]) for key, count in counts.items())))


def collect(database: Database, objects: ObjectStore, policy: Policy, *, dry_run: bool = False) -> Report:
    """Remove what the policy does not keep, or tell what that is.

    What nobody touches in between is the same in both cases.
    """
    now = datetime.now(UTC)
    if dry_run:
        left = find_removals(database)
        with database.read() as session:
            found = find_victims(session, policy, now, sum(removed.size_bytes for removed in left))
        done, sweeps = found.victims, len(found.sweeps)
        released = list(found.released.values())
    else:
        left = clear_removals(database, objects)
        with database.read() as session:
            found = find_victims(session, policy, now)
        done = _remove(database, found)
        sweeps = _remove_sweeps(database, found)
        cleared = clear_removals(database, objects)
        results = [removed for removed in cleared if removed.what == RESULT]
        released = [r.size_bytes for r in results if r.name in found.released or r.name not in found.gone]
    return report_of(
        [
            *(("files", _LEFT, removed.size_bytes) for removed in left),
            *((victim.kind, victim.why, victim.size_bytes) for victim in done),
            *(("sweeps", _EMPTY_SWEEPS, 0) for _ in range(sweeps)),
            *(("files", _RELEASED, size) for size in released),
        ]
    )


def _remove(database: Database, found: Removals) -> list[Victim]:
    """Take what is still as it was found out of the records; returns what was taken."""
    groups: dict[tuple[int, int, datetime, str], list[Victim]] = defaultdict(list)
    for victim in found.victims:
        groups[_turn(victim), victim.rank, victim.before, victim.kind].append(victim)
    done: list[Victim] = []
    for group in sorted(groups):
        for some in _batches(groups[group]):
            done += _remove_some(database, some)
    return done


def _turn(victim: Victim) -> int:
    """Jobs, then results, then uploads."""
    return 0 if victim.kind in KINDS.values() else 1 if victim.kind == "results" else 2


def _remove_some(database: Database, victims: list[Victim]) -> list[Victim]:
    """Remove victims of one kind in one transaction."""
    kind, before = victims[0].kind, victims[0].before
    names = [victim.name for victim in victims]
    with database.write() as session:
        if kind in SINGULAR:
            references: list[Reference] = [(kind, name) for name in names]
            gone = {name for _, name in drop_artefacts(session, references, artefact_used_at <= before)}
        elif kind == "results":
            gone = drop_results(session, names, job_used_at <= before)
        else:
            age = JobRow.finished_at if kind == KINDS[JobKind.ANALYSIS] else job_used_at
            gone = drop_jobs(session, names, age <= before)
    return [victim for victim in victims if victim.name in gone]


def _remove_sweeps(database: Database, found: Removals) -> int:
    """Remove the sweeps whose jobs are all gone; returns how many."""
    settle_deleted_sweeps(database)
    removed = 0
    for some in _batches(found.sweeps):
        empty = ~exists().where(JobRow.sweep_id == SweepRow.id)
        query = delete(SweepRow).where(SweepRow.id.in_(some), empty).returning(SweepRow.id)
        with database.write() as session:
            gone = session.scalars(query.execution_options(synchronize_session=False)).all()
            webhooks.forget(session, gone)
        removed += len(gone)
    return removed


def _batches(things: Iterable[T]) -> Iterator[list[T]]:
    remaining = iter(things)
    while some := list(islice(remaining, _PER_TRANSACTION)):
        yield some
