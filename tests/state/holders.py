"""Jobs filed, and held as workers hold them."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import text, update

from curvature_state import jobs
from curvature_state.jobs import NewJob
from curvature_state.tables import JobRow
from curvature_state.turns import take

REQUEST = {"model": "a" * 64, "batch": {"sha256": "b" * 64}, "extensions": [{"name": "grad"}]}
LEASE = 30.0


def make(database, key=None, digest="d", **changes):
    new = NewJob(REQUEST, digest, key, **{"metadata": {"run": "7"}, **changes})
    return jobs.create_job(database, new).job


def hold(database, job_id, worker="w1", lease_seconds=LEASE):
    """Claim this very job; None if it cannot be claimed."""
    with database.write() as session:
        return take(session, job_id, worker, lease_seconds)


def claimed(database, worker="w1", lease_seconds=LEASE, **changes):
    held = hold(database, make(database, **changes).id, worker, lease_seconds)
    assert held is not None
    return held


def status(database, job_id):
    return jobs.get_job(database, job_id).status


def age(database, job_id, **columns):
    """Set moments of a row, as if time had passed."""
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(**columns))


def expire(database, job_id):
    """Let a lease run out."""
    age(database, job_id, lease_expires_at=long_ago())


def long_ago(seconds=3600):
    return datetime.now(UTC) - timedelta(seconds=seconds)


def await_blocked_session(database):
    blocked = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND state = 'active'")
    found = 0
    while not found:
        with database.read() as session:
            found = session.scalar(blocked)
