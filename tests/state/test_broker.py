"""The bell on a real Redis-protocol server."""

import json
import time
from contextlib import suppress

import pytest
import redis
from tests.state.servers import RedisServer

from curvature_state import StateSettings, broker

pytestmark = pytest.mark.integration


@pytest.fixture
def app(redis_server, redis_connection):
    app = broker.celery_app(StateSettings(redis_url=redis_server.url))
    yield app
    app.close()


def heard(app):
    """The messages waiting, in the order in which a worker hears them."""
    found = []
    with app.connection_for_read() as connection, connection.SimpleQueue("curvature") as queue, suppress(queue.Empty):
        while True:
            found.append(queue.get_nowait())
            found[-1].ack()
    return found


def test_a_bell_carries_the_jobs_id_and_nothing_else(app):
    assert broker.ring(app, "job-1")
    (message,) = heard(app)
    assert message.content_type == "application/json"
    assert message.headers["task"] == "curvature.run_job"
    assert json.loads(message.body)[:2] == [["job-1"], {}]


def test_urgent_jobs_are_heard_first(app):
    for job_id, priority in (("calm", 0), ("usual", 5), ("urgent", 9), ("usual too", 5)):
        broker.ring(app, job_id, priority)
    assert [json.loads(m.body)[0][0] for m in heard(app)] == ["urgent", "usual", "usual too", "calm"]


def test_waiting_bells_are_counted_over_all_priorities(app, redis_connection):
    for priority in range(10):
        broker.ring(app, "job", priority)
    assert broker.count_bells(redis_connection) == 10
    heard(app)
    assert broker.count_bells(redis_connection) == 0


def test_an_absent_broker_is_told_soon(tmp_path):
    app = broker.celery_app(StateSettings(redis_url=f"unix://{tmp_path}/none.sock?db=0"))
    started = time.monotonic()
    assert not broker.ring(app, "job")
    assert time.monotonic() - started < 1
    app.close()


def test_a_broker_that_came_back_hears_the_next_bell():
    server = RedisServer()
    server.start()
    app = broker.celery_app(StateSettings(redis_url=server.url))
    try:
        assert broker.ring(app, "before")
        server.stop()
        assert not broker.ring(app, "away")
        server.start()
        assert broker.ring(app, "after")
        assert [json.loads(m.body)[0][0] for m in heard(app)] == ["after"]
    finally:
        app.close()
        server.close()


def test_counting_bells_of_an_absent_broker_raises(tmp_path):
    connection = redis.Redis.from_url(f"unix://{tmp_path}/none.sock")
    with pytest.raises(redis.RedisError):
        broker.count_bells(connection)
    connection.close()
