"""How jobs come to their end, the same on SQLite and PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update
from tests.state.holders import LEASE, age, await_blocked_session, claimed, hold, long_ago, make, status

from curvature_protocol.jobs import JobKind, JobStatus, Progress
from curvature_state import Database, holding, jobs
from curvature_state.cache import Cached, find_cached
from curvature_state.endings import MAX_ATTEMPTS, Success, confirm_cancel, fail, request_cancel, retry, succeed
from curvature_state.jobs import NewJob, problem
from curvature_state.tables import JobRow, TenantRow

# Ending


def test_success_is_final_and_keeps_the_warnings(database):
    held = claimed(database)
    assert succeed(database, held.id, held.attempt, Success(["a warning"]))
    job = jobs.get_job(database, held.id)
    assert (job.status, job.warnings) == (JobStatus.SUCCEEDED, ("a warning",))
    assert job.finished_at is not None
    assert not fail(database, held.id, held.attempt, problem("internal_error", "late"))


def test_failure_keeps_code_param_and_remedy(database):
    held = claimed(database)
    reason = problem("empty_batch", "no samples", param="batch", remedy="send some")
    assert fail(database, held.id, held.attempt, reason)
    job = jobs.get_job(database, held.id)
    assert job.status == JobStatus.FAILED
    assert job.error == reason
    assert job.error.status == 422


ENDS = {
    "succeeded": lambda database, held: succeed(database, held.id, held.attempt),
    "failed": lambda database, held: fail(database, held.id, held.attempt, problem("internal_error", "x")),
    "cancelled": lambda database, held: confirm_cancel(database, held.id, held.attempt),
    "queued": lambda database, held: holding.release(database, held.id, held.attempt),
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
    holding.renew(database, held.id, held.attempt, LEASE, Progress(phase="admitting"))
    ENDS[end](database, held)
    assert jobs.get_job(database, held.id).progress is None


def test_a_result_beats_a_cancellation(database):
    held = claimed(database)
    request_cancel(database, held.id)
    assert succeed(database, held.id, held.attempt)
    assert status(database, held.id) == JobStatus.SUCCEEDED


# Cancelling, in each state


def test_a_queued_job_is_cancelled_at_once(database):
    job = make(database)
    after = request_cancel(database, job.id).job
    assert after.status == JobStatus.CANCELLED
    assert after.finished_at is not None


def test_a_running_job_is_cancelled_when_its_worker_confirms(database):
    held = claimed(database)
    assert request_cancel(database, held.id).job.status == JobStatus.CANCELLING
    assert confirm_cancel(database, held.id, held.attempt)
    assert status(database, held.id) == JobStatus.CANCELLED


def test_a_finished_job_stays_as_it_is(database):
    held = claimed(database)
    succeed(database, held.id, held.attempt)
    assert request_cancel(database, held.id).job.status == JobStatus.SUCCEEDED


@pytest.mark.integration
def test_a_cancellation_is_not_lost_to_a_worker_that_hands_the_job_back_meanwhile(postgres_url):
    database = Database(postgres_url)
    held = claimed(database)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            session.execute(update(JobRow).where(JobRow.id == held.id).values(status="queued"))
            cancelling = pool.submit(request_cancel, database, held.id)
            await_blocked_session(database)
        assert cancelling.result().job.status == JobStatus.CANCELLED
        assert cancelling.result().job.finished_at is not None
    database.close()


def test_cancelling_an_unknown_job_is_none(database):
    assert request_cancel(database, "0" * 32) is None


# Another attempt


def test_a_failure_that_may_pass_is_tried_again_after_a_pause_and_not_for_ever(database):
    job = make(database)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert status(database, job.id) == JobStatus.QUEUED
        held = hold(database, job.id)
        fail(database, job.id, held.attempt, problem("worker_crashed", "killed"))
        with database.read() as session:
            pause = session.get(JobRow, job.id).not_before
        assert (pause is None) == (attempt == MAX_ATTEMPTS)
    failed = jobs.get_job(database, job.id)
    assert (failed.status, failed.error.code) == (JobStatus.FAILED, "worker_crashed")


def test_a_failure_of_the_jobs_own_is_final_at_once(database):
    held = claimed(database)
    fail(database, held.id, held.attempt, problem("invalid_targets", "no such class"))
    assert status(database, held.id) == JobStatus.FAILED


def test_a_cancelled_job_is_not_tried_again(database):
    held = claimed(database)
    request_cancel(database, held.id)
    fail(database, held.id, held.attempt, problem("worker_crashed", "killed"))
    assert status(database, held.id) == JobStatus.CANCELLED


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_retrying_queues_a_job_with_all_its_attempts(database, end):
    held = claimed(database)
    ENDS[end](database, held)
    again = retry(database, held.id).job
    assert (again.status, again.error, again.finished_at) == (JobStatus.QUEUED, None, None)
    for _ in range(MAX_ATTEMPTS):
        holder = hold(database, held.id)
        assert holder.attempt > held.attempt
        fail(database, held.id, holder.attempt, problem("worker_crashed", "killed"))
    assert status(database, held.id) == JobStatus.FAILED


def test_retrying_a_job_that_succeeded_or_runs_changes_nothing(database):
    held = claimed(database)
    assert retry(database, held.id).job.status == JobStatus.RUNNING
    succeed(database, held.id, held.attempt)
    assert retry(database, held.id).job.status == JobStatus.SUCCEEDED
    assert retry(database, "0" * 32) is None


# Data sets


def make_data_set(database, count=3):
    """(the job's id, the ids of its shards)."""
    parts = tuple(NewJob({"part": n}, "d", kind=JobKind.SHARD) for n in range(count))
    job = make(database, parts=parts)
    return job.id, [part.id for part in parts]


def finish(database, job_id):
    held = hold(database, job_id)
    return succeed(database, job_id, held.attempt)


def break_(database, job_id):
    held = hold(database, job_id)
    return fail(database, job_id, held.attempt, problem("invalid_targets", "no such class"))


def test_the_last_shard_queues_the_merging(database):
    job_id, shards = make_data_set(database)
    for done, shard in enumerate(shards, 1):
        (told,) = finish(database, shard).others
        assert (told.id, told.status) == (job_id, "queued" if done == len(shards) else "waiting")
    assert finish(database, job_id).job.status == JobStatus.SUCCEEDED


def test_a_success_told_twice_counts_once(database):
    job_id, shards = make_data_set(database)
    held = hold(database, shards[0])
    for _ in range(2):
        assert succeed(database, shards[0], held.attempt) is not None
    assert jobs.get_job(database, job_id).progress.done == 1


def test_shards_that_finish_at_once_are_all_counted(database):
    job_id, shards = make_data_set(database, 8)
    held = [hold(database, shard) for shard in shards]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda h: succeed(database, h.id, h.attempt), held))
    assert status(database, job_id) == JobStatus.QUEUED


def test_a_failed_shard_fails_the_job_and_stops_the_others(database):
    job_id, shards = make_data_set(database, 4)
    finish(database, shards[0])
    running = hold(database, shards[2])
    break_(database, shards[1])
    job = jobs.get_job(database, job_id)
    assert (job.status, job.error.code) == (JobStatus.FAILED, "invalid_targets")
    assert job.error.detail == "part 1 of 4: no such class"
    assert [status(database, s) for s in shards] == ["succeeded", "failed", "cancelling", "cancelled"]
    confirm_cancel(database, running.id, running.attempt)
    assert status(database, shards[2]) == JobStatus.CANCELLED


def test_retrying_computes_only_what_has_not_succeeded(database):
    job_id, shards = make_data_set(database)
    finish(database, shards[0])
    break_(database, shards[1])
    assert retry(database, job_id).job.status == JobStatus.WAITING
    assert [status(database, s) for s in shards] == ["succeeded", "queued", "queued"]
    for shard in shards[1:]:
        finish(database, shard)
    assert status(database, job_id) == JobStatus.QUEUED


def test_a_shard_that_was_stopping_when_its_job_was_retried_runs_again(database):
    job_id, shards = make_data_set(database)
    running = hold(database, shards[0])
    break_(database, shards[1])
    retry(database, job_id)
    assert status(database, shards[0]) == JobStatus.CANCELLING
    confirm_cancel(database, running.id, running.attempt)
    assert status(database, shards[0]) == JobStatus.QUEUED
    for shard in shards:
        finish(database, shard)
    assert status(database, job_id) == JobStatus.QUEUED


def test_cancelling_a_job_over_a_data_set_cancels_its_shards(database):
    job_id, shards = make_data_set(database)
    running = hold(database, shards[0])
    ending = request_cancel(database, job_id)
    assert ending.job.status == JobStatus.CANCELLED
    assert [job.id for job in ending.others] == [running.id]
    assert [status(database, s) for s in shards] == ["cancelling", "cancelled", "cancelled"]


def test_merging_that_failed_is_retried_without_computing_shards_again(database):
    job_id, shards = make_data_set(database)
    for shard in shards:
        finish(database, shard)
    break_(database, job_id)
    assert retry(database, job_id).job.status == JobStatus.QUEUED
    assert [status(database, s) for s in shards] == ["succeeded"] * 3


# What is written with a success


def test_what_others_may_take_stands_in_the_cache(database):
    held = claimed(database)
    succeed(database, held.id, held.attempt, Success(result_bytes=10, cached={"k" * 64: "variance"}))
    assert find_cached(database, "default", ["k" * 64, "x" * 64]) == {"k" * 64: Cached(held.id, 1, "variance")}
    assert find_cached(database, "other", ["k" * 64]) == {}


def test_two_jobs_that_computed_the_same_are_both_right(database):
    first, second = claimed(database), claimed(database)
    for held in (first, second):
        assert succeed(database, held.id, held.attempt, Success(result_bytes=1, cached={"k" * 64: "a"})) is not None
    assert find_cached(database, "default", ["k" * 64])["k" * 64].job_id == first.id


def test_a_tenant_is_charged_for_the_time_its_jobs_took(database):
    held = claimed(database)
    age(database, held.id, started_at=long_ago(100))
    succeed(database, held.id, held.attempt)
    with database.read() as session:
        assert 100 <= session.get(TenantRow, "default").virtual_seconds < 160
        assert 100 <= session.get(JobRow, held.id).worker_seconds < 160
