"""The background task: bells rung again, jobs taken from silent workers, abandoned uploads removed."""

import os

import pytest
from sqlalchemy import update
from tests.service.planting import claim, submit
from tests.service.test_events import follow
from tests.state.holders import hold
from tests.state.servers import RedisServer

from curvature_service.reconciler import reconcile_once, remove_abandoned_uploads, remove_leftover_results
from curvature_state import broker, endings, jobs
from curvature_state.tables import JobRow

pytestmark = pytest.mark.integration


def count_bells(server):
    return broker.count_bells(server.resources.redis)


def test_a_bell_lost_with_redis_is_rung_again(server, redis_server):
    submit(server.client)
    with redis_server.connect() as connection:
        connection.flushall()
    reconcile_once(server.resources)
    assert count_bells(server) == 1


def test_bells_do_not_pile_up_while_workers_are_busy(server):
    submit(server.client)
    for _ in range(3):
        reconcile_once(server.resources)
    assert count_bells(server) == 1


def test_a_silent_workers_job_is_rung_for_others_and_the_reader_told(server):
    job = submit(server.client)
    claim(server, job, lease_seconds=-1)
    stream = follow(server.client, job)
    next(stream)
    reconcile_once(server.resources)
    assert next(event for _, event in stream if (event.status, event.attempt) == ("queued", 1))
    stream.close()


def test_a_round_without_a_broker_still_takes_jobs_back(serve):
    absent = RedisServer()
    server = serve(redis_url=absent.url)
    job = submit(server.client)
    claim(server, job, lease_seconds=-1)
    reconcile_once(server.resources)
    assert jobs.get_job(server.resources.database, job.id).status == "queued"
    absent.close()


def test_the_task_goes_on_after_a_failing_round(serve):
    server = serve(reconcile_seconds=0.01)
    job = submit(server.client)
    with server.resources.database.write() as session:
        session.execute(update(JobRow).values(request={}, warnings=3))  # a row that cannot be shown
    claimed = hold(server.resources.database, job.id, "w", -1)
    assert claimed is not None
    # Rounds fail now, over and over; once the row is right again, one succeeds.
    with server.resources.database.write() as session:
        session.execute(update(JobRow).values(warnings=[]))
    while jobs.get_job(server.resources.database, job.id).status != "queued":
        pass


def test_uploads_abandoned_a_day_ago_are_removed(server):
    for name in ("old", "new"):
        server.resources.objects.put_bytes(f"uploads/{name}", b"x")
    os.utime(server.folder / "uploads/old", (1000, 1000))
    remove_abandoned_uploads(server.resources)
    assert server.stored() == ["uploads/new"]


def test_results_that_no_job_names_are_removed_after_a_day(server):
    job = submit(server.client)
    held = claim(server, job)
    endings.fail(server.resources.database, job.id, held.attempt, jobs.problem("internal_error", "x"))
    for attempt, name in ((held.attempt, "old"), (held.attempt, "new")):
        server.resources.objects.put_bytes(f"results/{job.id}/{attempt}/{name}", b"x")
    os.utime(server.folder / f"results/{job.id}/{held.attempt}/old", (1000, 1000))
    remove_leftover_results(server.resources)
    assert [key for key in server.stored() if key.startswith("results/")] == [f"results/{job.id}/1/new"]
