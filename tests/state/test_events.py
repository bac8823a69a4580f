"""A job's events on a real Redis stream."""

import asyncio
from datetime import UTC, datetime

import pytest
import redis
import redis.asyncio

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import JobStatus
from curvature_state import events

pytestmark = pytest.mark.integration

JOB = "1" * 32


def event(status=JobStatus.RUNNING, kind="state"):
    return JobEvent(event=kind, job_id=JOB, status=status, at=datetime.now(UTC), attempt=1)


def read(server, after="0", block_seconds=0.05):
    async def collect():
        async with redis.asyncio.Redis.from_url(server.url) as connection:
            return [found async for found in events.follow(connection, JOB, after, block_seconds)]

    return asyncio.run(collect())


def test_published_events_are_followed_in_order(redis_server, redis_connection):
    sent = [event(), event(kind="progress")]
    for one in sent:
        events.publish(redis_connection, one)
    assert [found for _, found in read(redis_server)] == sent


def test_following_ends_with_the_final_state(redis_server, redis_connection):
    for status in (JobStatus.RUNNING, JobStatus.SUCCEEDED, JobStatus.RUNNING):
        events.publish(redis_connection, event(status))
    assert [found.status for _, found in read(redis_server)] == [JobStatus.RUNNING, JobStatus.SUCCEEDED]


def test_following_resumes_after_an_id(redis_server, redis_connection):
    for _ in range(3):
        events.publish(redis_connection, event())
    ids = [event_id for event_id, _ in read(redis_server)]
    assert [event_id for event_id, _ in read(redis_server, after=ids[0])] == ids[1:]


def test_a_stream_that_is_not_there_ends_after_the_time_to_wait(redis_server, redis_connection):
    assert read(redis_server) == []


def test_streams_expire(redis_connection):
    events.publish(redis_connection, event())
    assert 0 < redis_connection.ttl(f"curvature:events:{JOB}") <= 24 * 3600


def test_streams_stay_short(redis_connection):
    for _ in range(1500):
        events.publish(redis_connection, event(kind="progress"))
    assert redis_connection.xlen(f"curvature:events:{JOB}") < 1200


def test_publishing_to_an_absent_redis_is_no_error(tmp_path):
    connection = redis.Redis.from_url(f"unix://{tmp_path}/none.sock")
    events.publish(connection, event())
    connection.close()


def test_following_an_absent_redis_raises(tmp_path):
    async def follow():
        async with redis.asyncio.Redis.from_url(f"unix://{tmp_path}/none.sock") as connection:
            return [found async for found in events.follow(connection, JOB, "0", 0.05)]

    with pytest.raises(redis.RedisError):
        asyncio.run(follow())
