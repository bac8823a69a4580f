"""Sweeps in the database, the same on SQLite and PostgreSQL."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import insert, select, update
from tests.state.holders import REQUEST, hold, status
from tests.state.test_webhooks import HOOK

from curvature_protocol.jobs import JobKind, JobStatus
from curvature_state import jobs, sweeps
from curvature_state.artefacts import ArtefactMissing
from curvature_state.endings import confirm_cancel, fail, retry, succeed
from curvature_state.jobs import NewJob, SweepPlace, problem
from curvature_state.sweeps import NewSweep
from curvature_state.tables import JobRow, SweepRow, TenantRow
from curvature_state.tenants import QueueFull
from curvature_state.turns import Claimant, claim_next
from curvature_state.webhooks import record_delivered, take_due

BAD = problem("empty_batch", "the batch has no samples")
CRASH = problem("worker_crashed", "the child died")


def new_sweep(rows=3, key=None, tenant="default", parts=(), **changes):
    """A sweep over seeds; rows whose place stands in `parts` are over data sets of so many parts."""
    sweep_id = uuid.uuid4().hex
    parts = dict(parts)
    made = []
    for row in range(rows):
        place = SweepPlace(sweep_id, row, {"seed": row})
        shards = tuple(NewJob(REQUEST, "d", tenant=tenant, kind=JobKind.SHARD) for _ in range(parts.get(row, 0)))
        made.append(NewJob({**REQUEST, "seed": row}, "d", tenant=tenant, sweep=place, parts=shards, **changes))
    return NewSweep(made, ("seed",), "d", key, tenant, {"run": "7"}, id=sweep_id)


def create(database, *arguments, **changes):
    return sweeps.create_sweep(database, new_sweep(*arguments, **changes)).sweep


def rows_of(database, sweep):
    return [row for row, _ in sweeps.list_rows(database, sweep.id, first=0, limit=1000)]


def finish(database, row, end="succeeded"):
    held = hold(database, row.job_id)
    if end == "succeeded":
        assert succeed(database, held.id, held.attempt)
    elif end == "failed":
        assert fail(database, held.id, held.attempt, BAD)


def shards_of(database, job_id):
    with database.read() as session:
        return session.scalars(select(JobRow.id).where(JobRow.parent_id == job_id).order_by(JobRow.part)).all()


def limit_queue(database, most, tenant="default"):
    with database.write() as session:
        session.execute(update(TenantRow).where(TenantRow.name == tenant).values(max_queued=most))


# Creation


def test_a_sweep_is_its_jobs_in_their_order(database):
    sweep = create(database, 3)
    assert (sweep.total, sweep.counts, sweep.done) == (3, {JobStatus.QUEUED: 3}, False)
    assert (sweep.axes, sweep.metadata) == (("seed",), {"run": "7"})
    rows = rows_of(database, sweep)
    assert [(row.row, row.coordinates, row.status) for row in rows] == [
        (place, {"seed": place}, JobStatus.QUEUED) for place in range(3)
    ]
    job = jobs.get_job(database, rows[2].job_id)
    assert (job.sweep, job.coordinates, job.request["seed"]) == (sweep.id, {"seed": 2}, 2)
    assert sweeps.get_sweep(database, sweep.id) == sweep


def test_rows_are_taken_up_in_their_order(database):
    sweep = create(database, 5)
    claimed = [claim_next(database, Claimant("w"), 30.0).id for _ in range(5)]
    assert claimed == [row.job_id for row in rows_of(database, sweep)]


def test_shards_are_no_rows(database):
    sweep = create(database, 2, parts={1: 4})
    assert sweep.counts == {JobStatus.QUEUED: 1, JobStatus.WAITING: 1}
    assert [row.row for row in rows_of(database, sweep)] == [0, 1]
    assert sweeps.read_states(database, sweep.id, sweep.total) == "qw"


def test_one_key_makes_one_sweep(database):
    first = sweeps.create_sweep(database, new_sweep(key="k"))
    again = sweeps.create_sweep(database, new_sweep(key="k"))
    assert (first.repeated, again.repeated) == (False, True)
    assert again.sweep == first.sweep
    assert sweeps.find_by_key(database, "another", "k") is None


def test_twins_make_one_sweep(database):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: sweeps.create_sweep(database, new_sweep(key="twin")), range(4)))
    assert len({created.sweep.id for created in made}) == 1
    assert len(jobs.list_jobs(database, status=None, limit=100, before=None)) == 3


def test_all_rows_are_written_or_none(database):
    new = new_sweep(3, artefacts=frozenset({("models", "a" * 64)}))
    with pytest.raises(ArtefactMissing):
        sweeps.create_sweep(database, new)
    assert sweeps.get_sweep(database, new.id) is None
    assert jobs.list_jobs(database, status=None, limit=100, before=None) == []


def test_a_tenant_without_room_for_all_rows_gets_none(database):
    create(database, 3)
    limit_queue(database, 5)
    with pytest.raises(QueueFull) as caught:
        create(database, 3)
    assert (caught.value.queued, caught.value.wanted) == (3, 3)
    with database.read() as session:
        assert len(session.scalars(select(SweepRow.id)).all()) == 1


# Looking


def test_a_sweep_of_another_tenant_is_none(database):
    sweep = create(database)
    assert sweeps.get_sweep(database, sweep.id, "default") is not None
    assert sweeps.get_sweep(database, sweep.id, "another") is None
    assert sweeps.cancel_sweep(database, sweep.id, "another") is None
    assert sweeps.retry_sweep(database, sweep.id, "another") is None
    assert sweeps.get_sweep(database, sweep.id).counts == {JobStatus.QUEUED: 3}


def test_counts_and_states_follow_the_jobs(database):
    sweep = create(database, 5)
    rows = rows_of(database, sweep)
    finish(database, rows[0])
    finish(database, rows[1], "failed")
    hold(database, rows[2].job_id)
    jobs_before = sweeps.get_sweep(database, sweep.id)
    assert jobs_before.counts == {
        JobStatus.SUCCEEDED: 1,
        JobStatus.FAILED: 1,
        JobStatus.RUNNING: 1,
        JobStatus.QUEUED: 2,
    }
    assert not jobs_before.done
    assert sweeps.is_unfinished(database, sweep.id)
    assert sweeps.read_states(database, sweep.id, 5) == "sfrqq"


def test_a_sweep_is_done_when_every_job_is_over(database):
    sweep = create(database, 2)
    for row, end in zip(rows_of(database, sweep), ("succeeded", "failed"), strict=True):
        finish(database, row, end)
    assert sweeps.get_sweep(database, sweep.id).done
    assert not sweeps.is_unfinished(database, sweep.id)


def test_a_deleted_job_leaves_a_gap(database):
    sweep = create(database, 3)
    rows = rows_of(database, sweep)
    with database.write() as session:
        session.delete(session.get_one(JobRow, rows[1].job_id))
    assert sweeps.read_states(database, sweep.id, 3) == "q-q"
    assert sweeps.get_sweep(database, sweep.id).total == 3


def test_rows_come_in_pages_and_by_state(database):
    sweep = create(database, 7)
    rows = rows_of(database, sweep)
    for row in (rows[1], rows[4], rows[5]):
        finish(database, row, "failed")
    page = sweeps.list_rows(database, sweep.id, first=3, limit=3)
    assert [row.row for row, _ in page] == [3, 4, 5]
    failed = sweeps.list_rows(database, sweep.id, first=2, limit=10, statuses=[JobStatus.FAILED])
    assert [(row.row, row.error.code, attempt) for row, attempt in failed] == [
        (4, "empty_batch", 1),
        (5, "empty_batch", 1),
    ]


def test_sweeps_are_listed_newest_first_by_tenant(database):
    made = [create(database, 1 + n) for n in range(3)]
    create(database, 1, tenant="another")
    found = sweeps.list_sweeps(database, "default", limit=2, before=None)
    assert [(sweep.id, sweep.counts) for sweep in found] == [
        (made[2].id, {JobStatus.QUEUED: 3}),
        (made[1].id, {JobStatus.QUEUED: 2}),
    ]
    rest = sweeps.list_sweeps(database, "default", limit=2, before=(found[-1].created_at, found[-1].id))
    assert [sweep.id for sweep in rest] == [made[0].id]


def test_what_is_queued_is_counted_by_what_it_requires(database):
    sweep = create(database, 3, parts={0: 4})
    first = shards_of(database, rows_of(database, sweep)[0].job_id)
    found = sweeps.count_queued(database, sweep.id)
    assert {kind: count for kind, (_, count) in found.items()} == {(False, None): 6}
    assert found[False, None][0] in {*first, *(row.job_id for row in rows_of(database, sweep)[1:])}


# Cancelling


def test_cancelling_stops_what_is_not_over(database):
    sweep = create(database, 4)
    rows = rows_of(database, sweep)
    finish(database, rows[0])
    held = hold(database, rows[1].job_id)
    changed = sweeps.cancel_sweep(database, sweep.id, "default")
    assert changed.sweep.counts == {JobStatus.SUCCEEDED: 1, JobStatus.CANCELLING: 1, JobStatus.CANCELLED: 2}
    assert jobs.get_job(database, rows[3].job_id).finished_at is not None
    confirm_cancel(database, held.id, held.attempt)
    assert sweeps.get_sweep(database, sweep.id).done


def test_cancelling_stops_the_shards_of_data_sets(database):
    sweep = create(database, 2, parts={0: 3})
    parent = rows_of(database, sweep)[0].job_id
    shards = shards_of(database, parent)
    hold(database, shards[0])
    changed = sweeps.cancel_sweep(database, sweep.id, "default")
    assert changed.sweep.counts == {JobStatus.CANCELLED: 2}
    assert [status(database, shard) for shard in shards] == [
        JobStatus.CANCELLING,
        JobStatus.CANCELLED,
        JobStatus.CANCELLED,
    ]
    assert {job.id for job in changed.jobs} == {parent, shards[0]}


def test_cancelling_leaves_other_jobs_alone(database):
    sweep, other = create(database, 2), create(database, 2)
    sweeps.cancel_sweep(database, sweep.id, "default")
    assert sweeps.get_sweep(database, other.id).counts == {JobStatus.QUEUED: 2}


# Retrying


def test_failed_and_cancelled_jobs_are_taken_up_again(database):
    sweep = create(database, 3)
    rows = rows_of(database, sweep)
    finish(database, rows[0])
    finish(database, rows[1], "failed")
    sweeps.cancel_sweep(database, sweep.id, "default")
    changed = sweeps.retry_sweep(database, sweep.id, "default")
    assert changed.sweep.counts == {JobStatus.SUCCEEDED: 1, JobStatus.QUEUED: 2}
    job = jobs.get_job(database, rows[1].job_id)
    assert (job.error, job.finished_at, job.attempt) == (None, None, 1)
    assert claim_next(database, Claimant("w"), 30.0).attempt == 2


def test_a_job_taken_up_again_has_all_its_attempts(database):
    sweep = create(database, 1)
    (row,) = rows_of(database, sweep)
    for _ in range(2):
        held = hold(database, row.job_id)
        fail(database, held.id, held.attempt, CRASH, max_attempts=2)
    assert status(database, row.job_id) == JobStatus.FAILED
    sweeps.retry_sweep(database, sweep.id, "default")
    held = hold(database, row.job_id)
    fail(database, held.id, held.attempt, CRASH, max_attempts=2)
    assert status(database, row.job_id) == JobStatus.QUEUED


def test_of_a_data_set_only_what_has_not_succeeded_is_computed_again(database):
    sweep = create(database, 1, parts={0: 3})
    parent = rows_of(database, sweep)[0].job_id
    shards = shards_of(database, parent)
    for shard, end in zip(shards, (None, BAD), strict=False):
        held = hold(database, shard)
        succeed(database, shard, held.attempt) if end is None else fail(database, shard, held.attempt, end)
    assert sweeps.get_sweep(database, sweep.id).counts == {JobStatus.FAILED: 1}
    changed = sweeps.retry_sweep(database, sweep.id, "default")
    assert changed.sweep.counts == {JobStatus.WAITING: 1}
    assert [status(database, shard) for shard in shards] == [
        JobStatus.SUCCEEDED,
        JobStatus.QUEUED,
        JobStatus.QUEUED,
    ]


def test_a_tenant_without_room_for_all_retries_none(database):
    sweep = create(database, 3, parts={2: 4})
    sweeps.cancel_sweep(database, sweep.id, "default")
    limit_queue(database, 5)
    with pytest.raises(QueueFull) as caught:
        sweeps.retry_sweep(database, sweep.id, "default")
    assert caught.value.wanted == 6
    assert sweeps.get_sweep(database, sweep.id).counts == {JobStatus.CANCELLED: 3}
    limit_queue(database, 6)
    assert sweeps.retry_sweep(database, sweep.id, "default").sweep.counts == {JobStatus.QUEUED: 2, JobStatus.WAITING: 1}


def test_a_retry_catches_up_with_tenants_that_waited(database):
    sweep = create(database, 1)
    sweeps.cancel_sweep(database, sweep.id, "default")
    with database.write() as session:
        session.execute(insert(TenantRow), [{"name": "busy", "virtual_seconds": 50.0, "created_at": sweep.created_at}])
    create(database, 1, tenant="busy")
    sweeps.retry_sweep(database, sweep.id, "default")
    with database.read() as session:
        assert session.get_one(TenantRow, "default").virtual_seconds == 50.0


# Webhooks


def told(database, sweep):
    """How often the sweep's end was told."""
    (message,) = take_due(database, 10)
    assert (message.subject, message.subject_id) == ("sweep", sweep.id)
    record_delivered(database, message)


@pytest.mark.parametrize("whole", [True, False])
def test_the_end_of_a_sweep_is_told_and_that_of_what_was_retried_once_more(database, whole):
    sweep = sweeps.create_sweep(database, replace(new_sweep(2), webhook=HOOK)).sweep
    rows = rows_of(database, sweep)
    finish(database, rows[0])
    assert take_due(database, 10) == []
    finish(database, rows[1], "failed")
    told(database, sweep)
    sweeps.retry_sweep(database, sweep.id, "default") if whole else retry(database, rows[1].job_id)
    assert take_due(database, 10) == []
    finish(database, rows[1])
    told(database, sweep)


def test_a_retry_of_nothing_tells_nothing(database):
    sweep = sweeps.create_sweep(database, replace(new_sweep(1), webhook=HOOK)).sweep
    finish(database, rows_of(database, sweep)[0])
    told(database, sweep)
    sweeps.retry_sweep(database, sweep.id, "default")
    assert take_due(database, 10) == []


def test_cancelling_and_retrying_at_once_leave_no_lock_behind(database):
    sweep = create(database, 50, parts={0: 3})
    steps = [sweeps.cancel_sweep, sweeps.retry_sweep] * 4
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: step(database, sweep.id, "default"), steps))
    counts = sweeps.get_sweep(database, sweep.id).counts
    assert sum(counts.values()) == 50
