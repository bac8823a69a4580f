"""The life of a job in the database, the same on SQLite and PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text, update

from curvature_protocol.jobs import JobStatus, Progress
from curvature_state import Database, jobs
from curvature_state.jobs import NewJob
from curvature_state.tables import JobRow

REQUEST = {"model": "a" * 64, "batch": {"sha256": "b" * 64}, "extensions": [{"name": "grad"}]}
LEASE = 30.0


def make(database, key=None, digest="d", priority=5):
    return jobs.create_job(database, NewJob(REQUEST, digest, key, priority=priority, metadata={"run": "7"})).job


def claimed(database, worker="w1", lease_seconds=LEASE):
    job = make(database)
    held = jobs.claim(database, job.id, worker, lease_seconds)
    assert held is not None
    return held


def status(database, job_id):
    return jobs.get_job(database, job_id).status


def age(database, job_id, **columns):
    """Set moments of a row, as if time had passed."""
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(**columns))


def long_ago(seconds=3600):
    return datetime.now(UTC) - timedelta(seconds=seconds)


# Creation


def test_a_new_job_is_queued_and_reads_back_whole(database):
    job = make(database)
    assert job.status == JobStatus.QUEUED
    assert jobs.get_job(database, job.id) == job
    assert job.request == REQUEST
    assert job.metadata == {"run": "7"}
    assert job.created_at.tzinfo is not None


def test_an_unknown_job_is_none(database):
    assert jobs.get_job(database, "0" * 32) is None


def test_one_idempotency_key_makes_one_job(database):
    first = jobs.create_job(database, NewJob(REQUEST, "d", "key"))
    again = jobs.create_job(database, NewJob(REQUEST, "other", "key"))
    assert (first.repeated, again.repeated) == (False, True)
    assert again.job.id == first.job.id
    assert again.body_digest == "d"


def test_jobs_without_a_key_are_all_new(database):
    assert make(database).id != make(database).id


def test_concurrent_twins_make_one_job(database):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: jobs.create_job(database, NewJob(REQUEST, "d", "twin")), range(8)))
    assert len({created.job.id for created in made}) == 1
    assert [created.repeated for created in made].count(False) == 1


# Claiming


def test_a_claim_runs_the_job_and_counts_the_attempt(database):
    held = claimed(database)
    job = jobs.get_job(database, held.id)
    assert (job.status, job.attempt) == (JobStatus.RUNNING, 1)
    assert job.started_at is not None
    assert held.request == REQUEST


def test_a_job_is_claimed_once(database):
    job = make(database)
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda n: jobs.claim(database, job.id, f"w{n}", LEASE), range(8)))
    assert sum(claim is not None for claim in claims) == 1


def test_a_cancelled_job_cannot_be_claimed(database):
    job = make(database)
    jobs.request_cancel(database, job.id)
    assert jobs.claim(database, job.id, "w1", LEASE) is None


# Holding


def test_renewing_keeps_the_lease_and_notes_progress(database):
    held = claimed(database)
    progress = Progress(phase="computing", done=1, total=2)
    assert jobs.renew(database, held.id, held.attempt, LEASE, progress) == JobStatus.RUNNING
    assert jobs.get_job(database, held.id).progress == progress


def test_the_holder_hears_of_a_cancellation(database):
    held = claimed(database)
    jobs.request_cancel(database, held.id)
    assert jobs.renew(database, held.id, held.attempt, LEASE, None) == JobStatus.CANCELLING
    assert jobs.peek(database, held.id, held.attempt) == JobStatus.CANCELLING


def test_an_older_attempt_holds_nothing(database):
    held = claimed(database)
    older = held.attempt - 1
    assert jobs.renew(database, held.id, older, LEASE, None) is None
    assert jobs.peek(database, held.id, older) is None
    assert not jobs.succeed(database, held.id, older, [])
    assert status(database, held.id) == JobStatus.RUNNING


def test_a_stopping_worker_hands_its_job_back(database):
    held = claimed(database)
    jobs.renew(database, held.id, held.attempt, LEASE, Progress(phase="computing"))
    assert jobs.release(database, held.id, held.attempt)
    job = jobs.get_job(database, held.id)
    assert (job.status, job.attempt, job.progress) == (JobStatus.QUEUED, 1, None)
    assert job.id in jobs.reconcile(database).ring


def test_the_number_of_an_attempt_handed_back_is_not_used_again(database):
    held = claimed(database)
    jobs.release(database, held.id, held.attempt)
    assert jobs.claim(database, held.id, "w2", LEASE).attempt == 2
    assert jobs.renew(database, held.id, held.attempt, LEASE, None) is None
    assert not jobs.release(database, held.id, held.attempt)
    assert status(database, held.id) == JobStatus.RUNNING


def test_handing_back_does_not_count_as_a_death(database):
    job = make(database)
    for _ in range(jobs.MAX_ATTEMPTS):
        jobs.release(database, job.id, jobs.claim(database, job.id, "stopping", LEASE).attempt)
    for _ in range(jobs.MAX_ATTEMPTS):
        assert status(database, job.id) == JobStatus.QUEUED
        jobs.claim(database, job.id, "dying", LEASE)
        age(database, job.id, lease_expires_at=long_ago())
        jobs.reconcile(database)
    assert "died 3 times" in jobs.get_job(database, job.id).error.detail


# Ending


def test_success_is_final_and_keeps_the_warnings(database):
    held = claimed(database)
    assert jobs.succeed(database, held.id, held.attempt, ["a warning"])
    job = jobs.get_job(database, held.id)
    assert (job.status, job.warnings) == (JobStatus.SUCCEEDED, ("a warning",))
    assert job.finished_at is not None
    assert not jobs.fail(database, held.id, held.attempt, jobs.problem("internal_error", "late"))


def test_failure_keeps_code_param_and_remedy(database):
    held = claimed(database)
    problem = jobs.problem("empty_batch", "no samples", param="batch", remedy="send some")
    assert jobs.fail(database, held.id, held.attempt, problem)
    job = jobs.get_job(database, held.id)
    assert job.status == JobStatus.FAILED
    assert job.error == problem
    assert job.error.status == 422


ENDS = {
    "succeeded": lambda database, held: jobs.succeed(database, held.id, held.attempt, []),
    "failed": lambda database, held: jobs.fail(database, held.id, held.attempt, jobs.problem("internal_error", "x")),
    "cancelled": lambda database, held: jobs.confirm_cancel(database, held.id, held.attempt),
    "queued": lambda database, held: jobs.release(database, held.id, held.attempt),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_end_whose_acknowledgement_was_lost_can_be_written_again(database, end):
    held = claimed(database)
    assert ENDS[end](database, held)
    once = jobs.get_job(database, held.id)
    assert ENDS[end](database, held)
    assert jobs.get_job(database, held.id) == once
    assert once.status == end


@pytest.mark.parametrize("end", ENDS)
def test_another_end_is_not_taken_for_the_own_one(database, end):
    held = claimed(database)
    ENDS[end](database, held)
    for other in ENDS.keys() - {end}:
        assert not ENDS[other](database, held)


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_a_job_that_is_over_shows_no_progress(database, end):
    held = claimed(database)
    jobs.renew(database, held.id, held.attempt, LEASE, Progress(phase="admitting"))
    ENDS[end](database, held)
    assert jobs.get_job(database, held.id).progress is None


def test_a_result_beats_a_cancellation(database):
    held = claimed(database)
    jobs.request_cancel(database, held.id)
    assert jobs.succeed(database, held.id, held.attempt, [])
    assert status(database, held.id) == JobStatus.SUCCEEDED


# Cancelling, in each state


def test_a_queued_job_is_cancelled_at_once(database):
    job = make(database)
    after = jobs.request_cancel(database, job.id)
    assert after.status == JobStatus.CANCELLED
    assert after.finished_at is not None


def test_a_running_job_is_cancelled_when_its_worker_confirms(database):
    held = claimed(database)
    assert jobs.request_cancel(database, held.id).status == JobStatus.CANCELLING
    assert jobs.confirm_cancel(database, held.id, held.attempt)
    assert status(database, held.id) == JobStatus.CANCELLED


def test_a_finished_job_stays_as_it_is(database):
    held = claimed(database)
    jobs.succeed(database, held.id, held.attempt, [])
    assert jobs.request_cancel(database, held.id).status == JobStatus.SUCCEEDED


@pytest.mark.integration
def test_a_cancellation_is_not_lost_to_a_worker_that_hands_the_job_back_meanwhile(postgres_url):
    database = Database(postgres_url)
    held = claimed(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == held.id).values(status="queued"))
            cancelling = pool.submit(jobs.request_cancel, database, held.id)
            await_blocked_session(database)
        assert cancelling.result().status == JobStatus.CANCELLED
        assert cancelling.result().finished_at is not None
    database.close()


def test_cancelling_an_unknown_job_is_none(database):
    assert jobs.request_cancel(database, "0" * 32) is None


# Listing


def test_the_list_has_the_newest_first_and_pages_without_gap_or_repeat(database):
    made = [make(database).id for _ in range(5)]
    seen, before = [], None
    while page := jobs.list_jobs(database, status=None, limit=2, before=before):
        seen += [job.id for job in page]
        before = (page[-1].created_at, page[-1].id)
    assert seen == made[::-1]


def test_pages_split_jobs_of_one_moment(database):
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    ids = sorted((make(database).id for _ in range(3)), reverse=True)
    for job_id in ids:
        age(database, job_id, created_at=moment)
    rest = jobs.list_jobs(database, status=None, limit=9, before=(moment, ids[0]))
    assert [job.id for job in rest] == ids[1:]


def test_the_list_filters_by_state(database):
    make(database)
    held = claimed(database)
    running = jobs.list_jobs(database, status=JobStatus.RUNNING, limit=9, before=None)
    assert [job.id for job in running] == [held.id]


def test_the_oldest_job_of_the_highest_priority_is_next(database):
    make(database, priority=5)
    first = make(database, priority=9)
    make(database, priority=9)
    assert jobs.oldest_queued(database) == first.id


# Reconciling


def test_nothing_is_done_while_all_is_well(database):
    claimed(database)
    make(database)
    done = jobs.reconcile(database)
    assert (done.changed, dict(done.ring)) == ((), {})


def test_a_silent_workers_job_is_queued_again(database):
    held = claimed(database)
    jobs.renew(database, held.id, held.attempt, LEASE, Progress(phase="computing"))
    age(database, held.id, lease_expires_at=long_ago())
    done = jobs.reconcile(database)
    job = jobs.get_job(database, held.id)
    assert [changed.id for changed in done.changed] == [held.id]
    assert held.id in done.ring
    assert (job.status, job.attempt, job.progress) == (JobStatus.QUEUED, 1, None)


def test_a_silent_workers_late_word_changes_nothing(database):
    held = claimed(database)
    age(database, held.id, lease_expires_at=long_ago())
    jobs.reconcile(database)
    assert not jobs.succeed(database, held.id, held.attempt, [])
    assert jobs.claim(database, held.id, "w2", LEASE).attempt == 2
    assert jobs.renew(database, held.id, held.attempt, LEASE, None) is None


def test_after_three_attempts_the_job_fails_with_the_reason(database):
    job = make(database)
    for _ in range(jobs.MAX_ATTEMPTS):
        assert jobs.claim(database, job.id, "w", LEASE) is not None
        age(database, job.id, lease_expires_at=long_ago())
        jobs.reconcile(database)
    failed = jobs.get_job(database, job.id)
    assert failed.status == JobStatus.FAILED
    assert failed.error.code == "attempts_exhausted"
    assert "died 3 times" in failed.error.detail
    assert failed.error.remedy


def test_a_silent_workers_cancelling_job_is_cancelled(database):
    held = claimed(database)
    jobs.request_cancel(database, held.id)
    age(database, held.id, lease_expires_at=long_ago())
    done = jobs.reconcile(database)
    assert status(database, held.id) == JobStatus.CANCELLED
    assert not done.ring


def test_queued_jobs_ring_again_once_per_while_the_most_urgent_first(database):
    calm, urgent = make(database, priority=1), make(database, priority=8)
    for job in (calm, urgent):
        age(database, job.id, rung_at=long_ago())
    assert list(jobs.reconcile(database).ring.items()) == [(urgent.id, 8), (calm.id, 1)]
    assert not jobs.reconcile(database).ring


def test_no_bell_is_added_while_enough_of_them_wait(database):
    job = make(database)
    age(database, job.id, rung_at=long_ago())
    assert not jobs.reconcile(database, bells=1).ring
    assert jobs.reconcile(database, bells=0).ring


@pytest.mark.integration
def test_several_reconcilers_take_a_job_back_once(database):
    held = claimed(database)
    age(database, held.id, lease_expires_at=long_ago())
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: jobs.reconcile(database), range(4)))
    assert sum(len(d.changed) for d in done) == 1


@pytest.mark.integration
def test_reconciling_waits_for_a_finish_and_does_not_overwrite_it(postgres_url):
    database = Database(postgres_url)
    held = claimed(database, lease_seconds=-1)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == held.id).values(status="succeeded"))
            reconciling = pool.submit(jobs.reconcile, database)
            await_blocked_session(database)
        assert reconciling.result().changed == ()
    assert status(database, held.id) == JobStatus.SUCCEEDED
    database.close()


def await_blocked_session(database):
    blocked = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'")
    found = 0
    while not found:
        with database.read() as session:
            found = session.scalar(blocked)
