"""Holding a job, the same on SQLite and PostgreSQL."""

from tests.state.holders import LEASE, claimed, expire, hold, make, status

from curvature_protocol.jobs import JobStatus, Progress
from curvature_state import holding, jobs
from curvature_state.endings import MAX_ATTEMPTS, request_cancel, succeed
from curvature_state.reconciling import take_back_expired


def test_renewing_keeps_the_lease_and_notes_progress(database):
    held = claimed(database)
    progress = Progress(phase="computing", done=1, total=2)
    assert holding.renew(database, held.id, held.attempt, LEASE, progress) == JobStatus.RUNNING
    assert jobs.get_job(database, held.id).progress == progress


def test_the_holder_hears_of_a_cancellation(database):
    held = claimed(database)
    request_cancel(database, held.id)
    assert holding.renew(database, held.id, held.attempt, LEASE, None) == JobStatus.CANCELLING
    assert holding.peek(database, held.id, held.attempt) == JobStatus.CANCELLING


def test_an_older_attempt_holds_nothing(database):
    held = claimed(database)
    older = held.attempt - 1
    assert holding.renew(database, held.id, older, LEASE, None) is None
    assert holding.peek(database, held.id, older) is None
    assert not succeed(database, held.id, older)
    assert status(database, held.id) == JobStatus.RUNNING


def test_a_stopping_worker_hands_its_job_back(database):
    held = claimed(database)
    holding.renew(database, held.id, held.attempt, LEASE, Progress(phase="computing"))
    assert holding.release(database, held.id, held.attempt)
    job = jobs.get_job(database, held.id)
    assert (job.status, job.attempt, job.progress) == (JobStatus.QUEUED, 1, None)


def test_the_number_of_an_attempt_handed_back_is_not_used_again(database):
    held = claimed(database)
    holding.release(database, held.id, held.attempt)
    assert hold(database, held.id, "w2", LEASE).attempt == 2
    assert holding.renew(database, held.id, held.attempt, LEASE, None) is None
    assert not holding.release(database, held.id, held.attempt)
    assert status(database, held.id) == JobStatus.RUNNING


def test_handing_back_does_not_count_as_a_death(database):
    job = make(database)
    for _ in range(MAX_ATTEMPTS):
        holding.release(database, job.id, hold(database, job.id, "stopping", LEASE).attempt)
    for _ in range(MAX_ATTEMPTS):
        assert status(database, job.id) == JobStatus.QUEUED
        hold(database, job.id, "dying", LEASE)
        expire(database, job.id)
        take_back_expired(database)
    assert f"died {MAX_ATTEMPTS} times" in jobs.get_job(database, job.id).error.detail
