"""Jobs taken from silent workers, and lost bells found, on SQLite and PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update
from tests.state.holders import LEASE, age, await_blocked_session, claimed, expire, hold, long_ago, make, status

from curvature_protocol.jobs import JobStatus, Progress
from curvature_protocol.requests import Requirements
from curvature_state import Database, holding, jobs
from curvature_state.endings import MAX_ATTEMPTS, request_cancel, succeed
from curvature_state.reconciling import find_waiting, take_back_expired
from curvature_state.tables import JobRow

# Reconciling


def test_nothing_is_done_while_all_is_well(database):
    claimed(database)
    make(database)
    assert take_back_expired(database) == []


def test_a_silent_workers_job_is_queued_again(database):
    held = claimed(database)
    holding.renew(database, held.id, held.attempt, LEASE, Progress(phase="computing"))
    expire(database, held.id)
    done = take_back_expired(database)
    job = jobs.get_job(database, held.id)
    assert [ending.job.id for ending in done] == [held.id]
    assert find_waiting(database) == []  # for a moment: what killed its worker may do so again
    age(database, held.id, not_before=long_ago())
    assert [waiting.job_id for waiting in find_waiting(database)] == [held.id]
    assert (job.status, job.attempt, job.progress) == (JobStatus.QUEUED, 1, None)


def test_a_silent_workers_late_word_changes_nothing(database):
    held = claimed(database)
    expire(database, held.id)
    take_back_expired(database)
    assert not succeed(database, held.id, held.attempt)
    assert hold(database, held.id, "w2", LEASE).attempt == 2
    assert holding.renew(database, held.id, held.attempt, LEASE, None) is None


def test_after_so_many_attempts_the_job_fails_with_the_reason(database):
    job = make(database)
    for _ in range(MAX_ATTEMPTS):
        assert hold(database, job.id, "w", LEASE) is not None
        expire(database, job.id)
        take_back_expired(database)
    failed = jobs.get_job(database, job.id)
    assert failed.status == JobStatus.FAILED
    assert failed.error.code == "attempts_exhausted"
    assert f"died {MAX_ATTEMPTS} times" in failed.error.detail
    assert failed.error.remedy


def test_a_silent_workers_cancelling_job_is_cancelled(database):
    held = claimed(database)
    request_cancel(database, held.id)
    expire(database, held.id)
    take_back_expired(database)
    assert status(database, held.id) == JobStatus.CANCELLED


def test_one_waiting_job_of_each_kind_of_requirement_is_found(database):
    for requires in ({}, {}, {"gpu": True}, {"tag": "a100"}, {"gpu": True, "tag": "a100"}):
        make(database, requires=Requirements(**requires))
    found = find_waiting(database)
    assert sorted((waiting.gpu, waiting.tag or "") for waiting in found) == [
        (False, ""),
        (False, "a100"),
        (True, ""),
        (True, "a100"),
    ]
    for waiting in found:
        assert status(database, waiting.job_id) == JobStatus.QUEUED


@pytest.mark.integration
def test_several_reconcilers_take_a_job_back_once(database):
    held = claimed(database)
    expire(database, held.id)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: take_back_expired(database), range(4)))
    assert sum(len(d) for d in done) == 1


@pytest.mark.integration
def test_reconciling_waits_for_a_finish_and_does_not_overwrite_it(postgres_url):
    database = Database(postgres_url)
    held = claimed(database, lease_seconds=-1)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == held.id).values(status="succeeded"))
            reconciling = pool.submit(take_back_expired, database)
            await_blocked_session(database)
        assert reconciling.result() == []
    assert status(database, held.id) == JobStatus.SUCCEEDED
    database.close()
