import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from tests.state.holders import hold
from tests.worker.desk import wait_until

from curvature_protocol.jobs import JobStatus, Progress
from curvature_state import Database, holding, jobs
from curvature_state.endings import request_cancel, succeed
from curvature_state.reconciling import take_back_expired
from curvature_state.tables import JobRow
from curvature_worker.errors import JobStopped, LeaseLost
from curvature_worker.lease import LeaseKeeper


@pytest.fixture
def database(settings):
    made = Database(settings.database_url)
    yield made
    made.close()


@pytest.fixture
def job(database):
    job_id = jobs.create_job(database, jobs.NewJob({}, "digest")).job.id
    return hold(database, job_id, "me", 5.0)


@pytest.fixture
def keep(database):
    """Makes keepers of leases."""
    made = []

    def make(settings):
        made.append(LeaseKeeper(database, settings))
        return made[-1]

    yield make
    for keeper in made:
        keeper.close()


@pytest.fixture
def keeper(keep, settings):
    return keep(settings)


@pytest.fixture
def outage(settings, database):
    """Takes the database away, and gives it back."""
    from pathlib import Path

    folder = Path(settings.database_url.removeprefix("sqlite:///")).parent

    class Outage:
        def begin(self):
            folder.rename(folder.with_name("away"))
            folder.write_text("nothing can be opened below a file")
            database.close()

        def end(self):
            folder.unlink()
            folder.with_name("away").rename(folder)

    return Outage()


def raised(lease, kind):
    """A condition: the lease's check raises it."""

    def condition():
        try:
            lease.check()
        except kind:
            return True
        return False

    return condition


def test_a_lease_is_renewed_for_as_long_as_it_is_held(database, job, settings, keeper):
    def expiry():
        with database.read() as session:
            return session.get(JobRow, job.id).lease_expires_at

    first = expiry()
    with keeper.hold(job) as lease:
        wait_until(lambda: expiry() > first + timedelta(seconds=0.3))
        lease.check()


def test_a_lease_shorter_than_the_pause_between_renewals_is_kept(database, settings, keep):
    short = settings.model_copy(update={"lease_seconds": 1.0, "renew_seconds": 3.0})
    job_id = jobs.create_job(database, jobs.NewJob({}, "digest")).job.id
    job = hold(database, job_id, "me", short.lease_seconds)
    begun, taken = time.monotonic(), []
    with keep(short).hold(job):
        wait_until(lambda: taken.extend(take_back_expired(database)) or time.monotonic() - begun > 1.5)
    assert taken == []


def test_progress_is_noted_with_the_renewal(database, job, settings, keeper):
    with keeper.hold(job) as lease:
        lease.progress = Progress(phase="computing", done=1, total=2)
        wait_until(lambda: (p := jobs.get_job(database, job.id).progress) and p.done == 1)


def test_a_cancellation_is_heard(database, job, settings, keeper):
    with keeper.hold(job) as lease:
        request_cancel(database, job.id)
        wait_until(raised(lease, JobStopped))


def test_a_job_of_somebody_else_is_lost(database, job, settings, keeper):
    with keeper.hold(job) as lease:
        with database.write() as session:
            session.get(JobRow, job.id).attempt += 1
        wait_until(raised(lease, LeaseLost))


def test_a_moment_without_database_loses_nothing(database, job, settings, outage, caplog, keeper):
    with keeper.hold(job) as lease:
        outage.begin()
        wait_until(lambda: "could not be renewed" in caplog.text)
        outage.end()
        before = datetime.now(UTC)
        wait_until(lambda: holding.peek(database, job.id, job.attempt) == JobStatus.RUNNING)
        with database.read() as session:
            assert session.get(JobRow, job.id).lease_expires_at > before
        lease.check()


def test_a_result_is_written_when_the_database_is_back(database, job, settings, outage, caplog, keeper):
    with keeper.hold(job) as lease:
        outage.begin()
        back = threading.Thread(
            target=lambda: (wait_until(lambda: "trying again" in caplog.text), outage.end()), daemon=True
        )
        back.start()
        assert lease.write(lambda: succeed(database, job.id, job.attempt))
        back.join()
    assert jobs.get_job(database, job.id).status == JobStatus.SUCCEEDED


def test_a_database_that_stays_away_loses_the_lease(database, job, settings, outage, keep):
    short = settings.model_copy(update={"lease_seconds": 0.3})
    with keep(short).hold(job) as lease:
        outage.begin()
        wait_until(raised(lease, LeaseLost))
        with pytest.raises(LeaseLost):
            lease.write(lambda: succeed(database, job.id, job.attempt))
    outage.end()
