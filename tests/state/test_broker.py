"""The bell on a real Redis-protocol server."""

import json
import time
from contextlib import suppress

import pytest
import redis
from tests.state.servers import RedisServer

from curvature_protocol.names import bell_queue
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


def test_bells_for_different_workers_wait_apart(app, redis_connection):
    for queue in (bell_queue(), bell_queue(gpu=True), bell_queue(tag="a100"), bell_queue(gpu=True, tag="a100")):
        broker.ring(app, "job", queue)
    counts = [broker.count_bells(redis_connection, q) for q in ("curvature", "curvature.gpu", "curvature.tag.a100")]
    assert counts == [1, 1, 2]
    heard(app)
    assert broker.count_bells(redis_connection) == 0


def test_no_more_bells_pile_up_than_can_wake_anybody(app, redis_connection):
    for _ in range(broker.ENOUGH_BELLS + 5):
        assert broker.ring_unless_enough(app, redis_connection, "job")
    assert broker.count_bells(redis_connection) == broker.ENOUGH_BELLS


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


@pytest.fixture
def limited(redis_server, redis_connection):
    """A broker whose memory is limited."""
    redis_connection.config_set("maxmemory", "100mb")
    yield redis_connection
    redis_connection.config_set("maxmemory-policy", "noeviction")
    redis_connection.config_set("maxmemory", "0")


def test_a_broker_that_may_throw_bells_away_is_refused(redis_server, limited):
    broker.check_broker(redis_server.url)
    limited.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(broker.BrokerUnfit, match=r"maxmemory-policy is allkeys-lru.*set it to noeviction"):
        broker.check_broker(redis_server.url)


def test_a_policy_without_a_limit_throws_nothing_away(redis_server, limited):
    limited.config_set("maxmemory-policy", "allkeys-lru")
    limited.config_set("maxmemory", "0")
    broker.check_broker(redis_server.url)


def test_a_broker_that_does_not_say_is_warned_of(redis_server, redis_connection, caplog):
    redis_connection.acl_setuser(
        "watched", enabled=True, nopass=True, keys="*", categories=["+@all"], commands=["-config"]
    )
    scheme, path = redis_server.url.split("//")
    broker.check_broker(f"{scheme}//watched:any@{path}")
    redis_connection.acl_deluser("watched")
    assert "must not evict" in caplog.text


def test_a_broker_that_is_away_keeps_nobody_from_starting(caplog):
    absent = RedisServer()
    broker.check_broker(absent.url)
    absent.close()
    assert "does not answer" in caplog.text
