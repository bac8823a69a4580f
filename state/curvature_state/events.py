"""A job's events: a short Redis stream per job. Losing it loses no job, only the bar's movement."""

from collections.abc import AsyncGenerator, Iterable
from datetime import UTC, datetime
from typing import Any

import redis
import redis.asyncio

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import FINAL, Job
from curvature_protocol.names import event_stream

_KEEP_EVENTS = 1000
_KEEP_SECONDS = 24 * 3600


def state_event(job: Job) -> JobEvent:
    """The event that says where a job stands."""
    return JobEvent(
        event="state",
        job_id=job.id,
        status=job.status,
        at=datetime.now(UTC),
        attempt=job.attempt,
        progress=job.progress,
        error=job.error,
        sweep=job.sweep,
    )


def publish(connection: "redis.Redis", *events: JobEvent) -> None:
    """Append to the jobs' streams, and states to their sweeps'; a Redis that does not answer is no reason to fail."""
    if not events:
        return
    try:
        with connection.pipeline(transaction=False) as pipe:
            keys: dict[str, None] = {}
            for event in events:
                told: dict[Any, Any] = {"event": event.model_dump_json()}
                for key in _streams(event):
                    pipe.xadd(key, told, maxlen=_KEEP_EVENTS, approximate=True)
                    keys[key] = None
            for key in keys:
                pipe.expire(key, _KEEP_SECONDS)
            pipe.execute()
    except redis.RedisError:
        return


def _streams(event: JobEvent) -> list[str]:
    """Where an event is told."""
    job = event_stream(event.job_id)
    return [job, event_stream(event.sweep)] if event.sweep is not None and event.event == "state" else [job]


def publish_all(connection: "redis.Redis", jobs: Iterable[Job]) -> None:
    """Tell where jobs stand."""
    publish(connection, *(state_event(job) for job in jobs))


async def follow(
    connection: "redis.asyncio.Redis", job_id: str, after: str, block_seconds: float, *, until_final: bool = True
) -> AsyncGenerator[tuple[str, JobEvent], None]:
    """Events after stream id `after`, until a final state (of a job) or `block_seconds` without any.

    Raises:
        redis.RedisError: if Redis does not answer.
    """
    key = event_stream(job_id)
    while True:
        found: Any = await connection.xread({key: after}, count=100, block=max(1, int(block_seconds * 1000)))
        if not found:
            return
        for entry_id, fields in _entries(found):
            after = _text(entry_id)
            event = _event(fields)
            yield after, event
            if until_final and event.status in FINAL:
                return


async def newest(connection: "redis.asyncio.Redis", job_id: str) -> str:
    """Stream id of the last event, "0" before the first.

    Raises:
        redis.RedisError: if Redis does not answer.
    """
    found: Any = await connection.xrevrange(event_stream(job_id), count=1)
    return _text(found[0][0]) if found else "0"


async def has_news(connection: "redis.asyncio.Redis", job_id: str, after: str, block_seconds: float) -> bool:
    """Whether there is an event after stream id `after`, or comes within `block_seconds`.

    Raises:
        redis.RedisError: if Redis does not answer.
    """
    return bool(await connection.xread({event_stream(job_id): after}, count=1, block=max(1, int(block_seconds * 1000))))


async def read_event(connection: "redis.asyncio.Redis", job_id: str, event_id: str) -> JobEvent | None:
    """The event of one stream id, if the stream still has it.

    Raises:
        redis.RedisError: if Redis does not answer.
    """
    found: Any = await connection.xrange(event_stream(job_id), event_id, event_id)
    return None if not found else _event(found[0][1])


def _event(fields: dict[Any, Any]) -> JobEvent:
    return JobEvent.model_validate_json(fields[b"event"] if b"event" in fields else fields["event"])


def _entries(found: Any) -> list[tuple[bytes, dict[Any, Any]]]:
    """The entries of the one stream asked for, in the reply's form of either protocol version."""
    if isinstance(found, dict):
        return [entry for group in found.values() for entries in group for entry in entries]
    return [entry for _, entries in found for entry in entries]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
