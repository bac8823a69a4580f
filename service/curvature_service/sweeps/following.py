"""A sweep's events as they happen: states of its jobs from its Redis stream, its counts from the database."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from curvature_protocol.events import JobEvent
from curvature_protocol.sweeps import Sweep
from curvature_service.errors import DATABASE_AWAY
from curvature_service.resources import Resources
from curvature_state import events
from curvature_state.sweeps import get_sweep

COUNTS_SECONDS = 1.0
"""How often counts are told, at most."""
_AT_ONCE = 0.001


async def follow_sweep(
    resources: Resources, sweep: Sweep, after: str, seconds: float | None = None
) -> AsyncIterator[tuple[str | None, JobEvent | Sweep]]:
    """(stream id, a job's state) and (None, the sweep), until every job is over, or for so many seconds.

    The stream is short, and Redis may lose it: of a large sweep, states are missed. The counts are the truth, told when
    they changed and at the end.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    told: Sweep | None = None
    while True:
        found = await _read(resources, sweep)
        if found is None:
            return
        sweep = found
        if not sweep.done and (told is None or sweep.counts != told.counts):
            told = sweep
            yield None, sweep
        until = min(deadline, time.monotonic() + COUNTS_SECONDS)
        patience = _AT_ONCE if sweep.done else max(_AT_ONCE, until - time.monotonic())
        try:
            stream = events.follow(resources.async_redis, sweep.id, after, patience, until_final=False)
            async with aclosing(stream):
                async for event_id, event in stream:
                    after = event_id
                    yield event_id, event
                    if time.monotonic() >= until:
                        break
        except RedisError:
            await asyncio.sleep(patience)
        if sweep.done:
            yield None, sweep
            return
        if time.monotonic() >= deadline:
            return


async def _read(resources: Resources, sweep: Sweep) -> Sweep | None:
    """The sweep as it is now, as it was while the database is away; None: it was deleted."""
    try:
        return await run_in_threadpool(get_sweep, resources.database, sweep.id)
    except DATABASE_AWAY:
        return sweep
