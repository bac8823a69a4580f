"""A job's events as they happen: from its Redis stream, from the database where that is gone."""

import asyncio
from collections.abc import AsyncIterator

from redis import RedisError

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import FINAL, JobStatus
from curvature_service.jobs.service import POLL_SECONDS, find_job
from curvature_service.resources import Resources
from curvature_state import events


async def follow_job(resources: Resources, job_id: str, after: str) -> AsyncIterator[tuple[str | None, JobEvent]]:
    """(stream id or None, event), until the final state."""
    last: JobStatus | None = None
    while True:
        try:
            async for event_id, event in events.follow(resources.async_redis, job_id, after, POLL_SECONDS):
                after, last = event_id, event.status
                yield event_id, event
        except RedisError:
            await asyncio.sleep(POLL_SECONDS)
        if last in FINAL:
            return
        job = await find_job(resources, job_id)
        if job.status != last and (job.status in FINAL or last is None):
            last = job.status
            yield None, events.state_event(job)
        if job.status in FINAL:
            return
