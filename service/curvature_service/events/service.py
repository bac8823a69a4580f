"""A job's events as they happen: from its Redis stream, from the database where that is gone."""

import asyncio
import math
import time
from collections.abc import AsyncIterator

from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import FINAL, Job, JobStatus, Progress
from curvature_service.errors import DATABASE_AWAY
from curvature_service.resources import Resources
from curvature_state import events
from curvature_state.jobs import get_job

POLL_SECONDS = 1.0
_AT_ONCE = 0.001

Standing = tuple[JobStatus, int, Progress | None]


async def follow_job(
    resources: Resources, job_id: str, after: str, seconds: float | None = None
) -> AsyncIterator[tuple[str | None, JobEvent]]:
    """(stream id or None, event), until the final state, or for so many seconds.

    What the stream holds comes first; then the state by the database, if the stream did not tell it. The database
    leads the stream, so a state told from there is not told once more when the stream brings it.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    told = await _told_before(resources, job_id, after)
    patience = _AT_ONCE
    while True:
        try:
            async for event_id, event in events.follow(resources.async_redis, job_id, after, patience):
                after = event_id
                if event.event == "state" and _standing(event) == told:
                    continue
                told = _standing(event)
                yield event_id, event
                if time.monotonic() > deadline:
                    return
        except RedisError:
            await asyncio.sleep(patience)
        if told is not None and told[0] in FINAL:
            return
        job = await _read(resources, job_id)
        if job is not None and _standing(job) != told:
            told = _standing(job)
            yield None, events.state_event(job)
        if job is not None and job.status in FINAL:
            return
        patience = min(POLL_SECONDS, deadline - time.monotonic())
        if patience <= 0:
            return


def _standing(told: Job | JobEvent) -> Standing:
    """What of a job's state is news: of one that waits for its shards, also how many are there."""
    return told.status, told.attempt, told.progress if told.status == JobStatus.WAITING else None


async def _told_before(resources: Resources, job_id: str, after: str) -> Standing | None:
    """The state that a follower who saw event `after` knows of; an end is told again all the same."""
    try:
        seen = None if after == "0" else await events.read_event(resources.async_redis, job_id, after)
    except RedisError:
        return None
    return None if seen is None or seen.status in FINAL else _standing(seen)


async def _read(resources: Resources, job_id: str) -> Job | None:
    """The job, or None while the database is away: a stream once opened outlasts that."""
    try:
        return await run_in_threadpool(get_job, resources.database, job_id)
    except DATABASE_AWAY:
        return None
