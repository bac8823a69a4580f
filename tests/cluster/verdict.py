"""Whether nothing was lost, duplicated or torn: promises, records and stored files held against each other."""

import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import select
from tests.cluster.crowd import Outcome
from tests.cluster.processes import System

from curvature_protocol.jobs import JobKind, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest
from curvature_state import Database, ObjectStore
from curvature_state.leftovers import remove_leftovers
from curvature_state.tables import JobRow

_OF_THE_MOMENT = {"job_id", "attempt", "created_at", "timings_ms", "groups"}
"""What may differ between two manifests of one request."""
_OF_THE_WAY = {"verification", "cached_from"}


@dataclass
class Verdict:
    """What was found; the lists hold one line per finding."""

    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Jobs that failed for no reason of their own, or did not fail for theirs."""
    unequal: list[str] = field(default_factory=list)
    attempts: dict[int, int] = field(default_factory=dict)
    """Number of attempts → how many of the disturbed jobs, shards among them, took so many."""
    leftovers: int = 0
    """Files of attempts that came to nothing, removed before the store was looked at."""

    @property
    def problems(self) -> list[str]:
        """All findings."""
        lists = {name: getattr(self, name) for name in ("lost", "duplicated", "torn", "failed", "unequal")}
        return [f"{name}: {line}" for name, lines in lists.items() for line in lines]


def judge(system: System, disturbed: Sequence[Outcome], undisturbed: Sequence[Outcome]) -> Verdict:
    """Judge a run whose every task was also done undisturbed."""
    verdict = Verdict()
    database, objects = Database(system.database_url), ObjectStore(system.storage_url)
    try:
        for outcome in (*disturbed, *undisturbed):
            _judge_outcome(verdict, outcome)
        _compare(verdict, disturbed, undisturbed)
        rows = _rows(database)
        _judge_records(verdict, rows, disturbed, undisturbed)
        verdict.leftovers = remove_leftovers(database, objects, time.time() + 1)
        _judge_store(verdict, objects, rows, [*disturbed, *undisturbed])
    finally:
        database.close()
    return verdict


def _judge_outcome(verdict: Verdict, outcome: Outcome) -> None:
    task, told = outcome.task, f"task {outcome.task.number}, job {outcome.job_id}: {outcome.status}"
    if (
        outcome.job_id is None
        or outcome.status not in ("succeeded", "failed")
        or (outcome.status == "succeeded" and outcome.manifest is None)
    ):
        verdict.lost.append(f"{told}: {outcome.trouble}")
    elif (outcome.status == "failed") != (task.refusal is not None) or outcome.code != task.refusal:
        verdict.failed.append(f"{told} ({outcome.code}, expected {task.refusal}): {outcome.trouble}")


def _compare(verdict: Verdict, disturbed: Sequence[Outcome], undisturbed: Sequence[Outcome]) -> None:
    expected = {outcome.task.number: outcome for outcome in undisturbed}
    for outcome in disturbed:
        twin = expected[outcome.task.number]
        if outcome.manifest is None or twin.manifest is None:
            continue
        told = f"task {outcome.task.number}, jobs {outcome.job_id} and {twin.job_id}"
        if outcome.digests != twin.digests:
            names = [name for name in twin.digests if outcome.digests.get(name) != twin.digests[name]]
            verdict.unequal.append(f"{told}: tensors {names or 'missing'}")
        if _lasting(outcome.manifest) != _lasting(twin.manifest):
            verdict.unequal.append(f"{told}: manifests {_lasting(outcome.manifest)} and {_lasting(twin.manifest)}")


def _lasting(manifest: Manifest) -> dict[str, object]:
    """What must not depend on the moment."""
    kept = manifest.model_dump(mode="json", exclude=_OF_THE_MOMENT)
    for group in manifest.groups:
        for tensor in group.tensors:
            kept[f"{group.label}/{tensor.name}"] = (
                tensor.shape,
                tensor.dtype,
                tensor.provenance.model_dump(mode="json", exclude=_OF_THE_WAY),
            )
    return kept


def _rows(database: Database) -> dict[str, JobRow]:
    with database.read() as session:
        return {row.id: row for row in session.scalars(select(JobRow))}


def _judge_records(
    verdict: Verdict, rows: Mapping[str, JobRow], disturbed: Sequence[Outcome], undisturbed: Sequence[Outcome]
) -> None:
    """As many rows as promises: no retried submission made two, none is gone; and as many shards as parts."""
    promised = Counter(outcome.job_id for outcome in (*disturbed, *undisturbed) if outcome.job_id is not None)
    verdict.duplicated += [f"job {job_id} was promised {n} times" for job_id, n in promised.items() if n > 1]
    own = {job_id for job_id, row in rows.items() if row.kind == JobKind.ANALYSIS}
    verdict.lost += [f"job {job_id} has no record" for job_id in promised.keys() - own]
    verdict.duplicated += [f"job {job_id} was promised to nobody" for job_id in own - promised.keys()]
    for row in rows.values():
        if row.status not in (JobStatus.SUCCEEDED, JobStatus.FAILED):
            verdict.lost.append(f"{row.kind} {row.id} is still {row.status}, attempt {row.attempt}")
    shards = Counter(row.parent_id for row in rows.values() if row.kind == JobKind.SHARD)
    for outcome in (*disturbed, *undisturbed):
        if outcome.job_id in rows and shards[outcome.job_id] != outcome.task.parts:
            told = f"job {outcome.job_id} has {shards[outcome.job_id]} shards of {outcome.task.parts}"
            verdict.duplicated.append(told)
    mine = {outcome.job_id for outcome in disturbed}
    verdict.attempts = dict(Counter(row.attempt for row in rows.values() if mine & {row.id, row.parent_id}))


def _judge_store(
    verdict: Verdict, objects: ObjectStore, rows: Mapping[str, JobRow], outcomes: Sequence[Outcome]
) -> None:
    """One attempt's files per job that succeeded, complete and of the sizes that the manifest names; no others."""
    stored: dict[str, set[int]] = defaultdict(set)
    files = set()
    for key, _ in objects.list("results"):
        _, job_id, attempt, _ = key.split("/")
        stored[job_id].add(int(attempt))
        files.add(key)
    for job_id, attempts in stored.items():
        row = rows.get(job_id)
        if row is None or row.status != JobStatus.SUCCEEDED or attempts != {row.attempt}:
            is_now = "no record" if row is None else f"{row.status}, attempt {row.attempt}"
            verdict.duplicated.append(f"files of job {job_id} of attempts {sorted(attempts)}, which has {is_now}")
    for outcome in outcomes:
        if outcome.manifest is not None:
            verdict.torn += _find_torn(objects, files, outcome, outcome.manifest)


def _find_torn(objects: ObjectStore, files: set[str], outcome: Outcome, manifest: Manifest) -> list[str]:
    """What a result's manifest promises and the store does not hold, or not with the bytes that the client got."""
    found = []
    if (key := result_key(manifest.job_id, manifest.attempt, "manifest.json")) not in files:
        found.append(f"{key} is not stored")
    for group in manifest.groups:
        if any(tensor.parts for tensor in group.tensors):
            continue  # its shards' files are looked at as theirs
        key = result_key(manifest.job_id, manifest.attempt, f"{group.label}.safetensors")
        data = objects.get_bytes(key) if key in files else b""
        if len(data) != group.file_bytes:
            found.append(f"{key}: {len(data)} bytes are stored, {group.file_bytes} in the manifest")
        for tensor in group.tensors:
            part = data[tensor.byte_start : tensor.byte_end]
            if hashlib.sha256(part).hexdigest() != outcome.digests[f"{group.label}/{tensor.name}"]:
                found.append(f"{key}: {tensor.name} is not what the client read")
    return found
