"""Whose turn it is, on SQLite and PostgreSQL."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from tests.state.holders import LEASE, REQUEST, age, hold, long_ago, make, status

from curvature_protocol.jobs import JobStatus
from curvature_protocol.requests import Requirements
from curvature_state import Database, jobs
from curvature_state.endings import request_cancel, succeed
from curvature_state.jobs import NewJob, insert_jobs
from curvature_state.tables import TenantRow
from curvature_state.turns import Claimant, claim_next, has_turn

WORKER = Claimant("w")


def claim(database, claimant=WORKER):
    held = claim_next(database, claimant, LEASE)
    return None if held is None else held.id


def set_tenant(database, name, **columns):
    with database.write() as session:
        row = session.get(TenantRow, name)
        for column, value in columns.items():
            setattr(row, column, value)


def test_a_claim_runs_the_job_and_counts_the_attempt(database):
    made = make(database)
    held = claim_next(database, WORKER, LEASE)
    job = jobs.get_job(database, made.id)
    assert (held.id, held.attempt, held.request) == (made.id, 1, made.request)
    assert (job.status, job.attempt) == (JobStatus.RUNNING, 1)
    assert job.started_at is not None
    assert claim(database) is None


def test_each_job_is_claimed_once(database):
    made = {make(database).id for _ in range(12)}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda n: claim(database, Claimant(f"w{n}")), range(12)))
    assert Counter(found) == Counter(made)


def test_a_cancelled_job_is_nobodys(database):
    request_cancel(database, make(database).id)
    assert claim(database) is None


def test_the_oldest_job_of_the_highest_priority_is_next(database):
    last, first, second = make(database, priority=5), make(database, priority=9), make(database, priority=9)
    assert [claim(database) for _ in range(3)] == [first.id, second.id, last.id]


def test_jobs_written_together_are_taken_up_in_their_order(database):
    news = [NewJob({}, "d") for _ in range(50)]
    with database.write() as session:
        insert_jobs(session, news)
    assert [claim(database) for _ in range(50)] == [new.id for new in news]


def test_a_job_that_waits_for_a_moment_is_passed_over(database):
    waits, other = make(database), make(database)
    age(database, waits.id, not_before=datetime.now(UTC) + timedelta(hours=1))
    assert [claim(database), claim(database)] == [other.id, None]
    age(database, waits.id, not_before=long_ago())
    assert claim(database) == waits.id


@pytest.mark.parametrize(
    ("requires", "fits", "does_not"),
    [
        ({"gpu": True}, Claimant("w", gpu=True), Claimant("w")),
        ({"tag": "a100"}, Claimant("w", tags=("big", "a100")), Claimant("w", tags=("a",))),
        ({"memory_bytes": 100}, Claimant("w", memory_bytes=100), Claimant("w", memory_bytes=99)),
    ],
)
def test_a_job_goes_to_a_worker_that_has_what_it_requires(database, requires, fits, does_not):
    job = make(database, requires=Requirements(**requires))
    assert not has_turn(database, does_not)
    assert claim(database, does_not) is None
    assert has_turn(database, fits)
    assert claim(database, fits) == job.id


def test_a_job_that_no_one_can_do_holds_up_no_other(database):
    make(database, requires=Requirements(gpu=True), priority=9)
    other = make(database)
    assert claim(database) == other.id


# Tenants


def spend(database, seconds, claimant=WORKER):
    """Have the next job run for so long; returns whose it was."""
    held = claim_next(database, claimant, LEASE)
    age(database, held.id, started_at=long_ago(seconds))
    succeed(database, held.id, held.attempt)
    return held.tenant


def file(database, tenant, count):
    with database.write() as session:
        insert_jobs(session, [NewJob({}, "d", tenant=tenant) for _ in range(count)])


def test_one_tenants_many_jobs_do_not_starve_anothers_one(database):
    file(database, "many", 100)
    for _ in range(10):
        spend(database, 1)
    file(database, "one", 1)
    assert "one" in {spend(database, 1), spend(database, 1)}


def test_tenants_get_equal_time_not_equal_numbers_of_jobs(database):
    file(database, "long", 20)
    file(database, "short", 100)
    spent = Counter()
    for _ in range(44):
        tenant = claim_tenant(database)
        spent[tenant[0]] += tenant[1]
    assert abs(spent["long"] - spent["short"]) <= 100


def claim_tenant(database):
    held = claim_next(database, WORKER, LEASE)
    seconds = 100 if held.tenant == "long" else 10
    age(database, held.id, started_at=long_ago(seconds))
    succeed(database, held.id, held.attempt)
    return held.tenant, seconds


def test_a_tenant_of_twice_the_weight_gets_twice_the_time(database):
    file(database, "heavy", 60)
    file(database, "light", 60)
    set_tenant(database, "heavy", weight=2.0)
    turns = Counter(spend(database, 100) for _ in range(30))
    assert turns == {"heavy": 20, "light": 10}


def test_time_not_used_is_not_saved_up(database):
    file(database, "busy", 40)
    for _ in range(10):
        spend(database, 1000)
    file(database, "late", 40)
    turns = Counter(spend(database, 1000) for _ in range(10))
    assert turns == {"busy": 5, "late": 5}


def test_workers_that_are_free_at_one_moment_serve_different_tenants(database):
    file(database, "a", 5)
    file(database, "b", 5)
    assert {claim_next(database, Claimant(f"w{n}"), LEASE).tenant for n in range(2)} == {"a", "b"}


def test_a_tenant_has_no_more_jobs_running_than_it_may(database):
    file(database, "bounded", 9)
    set_tenant(database, "bounded", max_running=2)
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda n: claim_next(database, Claimant(f"w{n}"), LEASE), range(5)))
    held = [claim for claim in found if claim is not None]
    assert len(held) == 2
    other = make(database)
    assert claim(database) == other.id
    succeed(database, held[0].id, held[0].attempt)
    assert claim(database) is not None
    assert claim(database) is None


def test_a_job_is_held_by_one(database):
    job = make(database)
    with ThreadPoolExecutor(8) as pool:
        held = list(pool.map(lambda n: hold(database, job.id, f"w{n}"), range(8)))
    assert sum(h is not None for h in held) == 1
    assert status(database, job.id) == JobStatus.RUNNING


@pytest.mark.integration
def test_a_claim_reads_few_rows_however_many_are_queued(postgres_url):
    database = Database(postgres_url)
    try:
        with database.write() as session:  # the statistics know of none of them
            insert_jobs(session, [NewJob(REQUEST, "d") for _ in range(2000)])
        before = rows_read(database)
        assert claim(database) is not None
        assert has_turn(database, WORKER)
        assert rows_read(database) - before < 50
    finally:
        database.close()


def rows_read(database):
    """Rows of jobs that PostgreSQL has read so far."""
    with database.write() as session:
        session.execute(text("SELECT pg_stat_force_next_flush()"))
    with database.read() as session:
        query = "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables WHERE relname = 'jobs'"
        return session.scalar(text(query))
