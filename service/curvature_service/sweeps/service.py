"""Finding, waiting for, listing, cancelling and retrying sweeps, and tables of their rows."""

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor

from fastapi.concurrency import run_in_threadpool
from redis import RedisError

from curvature_protocol.jobs import FINAL, JobStatus
from curvature_protocol.names import result_key
from curvature_protocol.sweeps import RowResult, Sweep, SweepPage, SweepRows, SweepRowView, SweepStates
from curvature_service.bells import ring
from curvature_service.cursors import cursor_after, read_cursor
from curvature_service.errors import ApiError
from curvature_service.jobs.submission import full, missing
from curvature_service.resources import Resources
from curvature_state import events
from curvature_state.artefacts import ArtefactMissing
from curvature_state.manifests import MANIFEST
from curvature_state.sweeps import (
    Changed,
    cancel_sweep,
    count_queued,
    get_sweep,
    is_unfinished,
    list_rows,
    list_sweeps,
    read_states,
    retry_sweep,
)
from curvature_state.tenants import QueueFull

POLL_SECONDS = 1.0
"""How often the database is asked while no event comes; it is the truth."""
PAUSE_SECONDS = 0.1
"""How long at least lies between two looks, however many events come."""
_PAUSE_SECONDS_PER_ROW = 1.5e-4
_LONGEST_PAUSE_SECONDS = 5.0
_READERS = 16
"""Manifests read at a time."""

_SWEEP_ID = re.compile(r"[0-9a-f]{32}")


async def find_sweep(resources: Resources, tenant: str, sweep_id: str) -> Sweep:
    """The tenant's sweep.

    Raises:
        ApiError: `sweep_not_found`, also for a sweep of another tenant.
    """
    known = _SWEEP_ID.fullmatch(sweep_id) is not None
    sweep = await run_in_threadpool(get_sweep, resources.database, sweep_id, tenant) if known else None
    if sweep is None:
        raise unknown(sweep_id)
    return sweep


def unknown(sweep_id: str) -> ApiError:
    """The refusal of an id that no sweep has."""
    return ApiError(
        "sweep_not_found",
        f"there is no sweep {sweep_id[:50]!r}",
        param="sweep_id",
        remedy="GET /v1/sweeps lists the sweeps",
    )


async def wait_for(resources: Resources, tenant: str, sweep: Sweep, seconds: float) -> Sweep:
    """The sweep when all its jobs are over, or as it is after `seconds`."""
    deadline = time.monotonic() + seconds
    after = await newest(resources, sweep.id)
    while await run_in_threadpool(is_unfinished, resources.database, sweep.id):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        after = await await_news(resources, sweep.id, after, left)
    return await find_sweep(resources, tenant, sweep.id)


async def states_beyond(
    resources: Resources, tenant: str, sweep: Sweep, finished: int | None, seconds: float
) -> SweepStates:
    """Where all rows stand, as soon as another number of them than `finished` is over, or after `seconds`."""
    deadline = time.monotonic() + seconds
    after = await newest(resources, sweep.id) if finished is not None and seconds else "0"
    if finished is not None and not sweep.done:
        await asyncio.sleep(min(seconds, _pause(sweep.total)))
        sweep = await find_sweep(resources, tenant, sweep.id)
    while finished is not None and not sweep.done and count_finished(sweep) == finished:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        after = await await_news(resources, sweep.id, after, left)
        sweep = await find_sweep(resources, tenant, sweep.id)
    return SweepStates(states=await run_in_threadpool(read_states, resources.database, sweep.id, sweep.total))


def _pause(rows: int) -> float:
    """How long to let things happen before all rows are looked at: else looking at many costs more than they do."""
    return min(_LONGEST_PAUSE_SECONDS, max(PAUSE_SECONDS, rows * _PAUSE_SECONDS_PER_ROW))


def count_finished(sweep: Sweep) -> int:
    """How many of its rows are over; one whose job was deleted is."""
    return sweep.total - sum(count for status, count in sweep.counts.items() if status not in FINAL)


async def newest(resources: Resources, sweep_id: str) -> str:
    """Stream id of the last event; what comes after it is news."""
    try:
        return await events.newest(resources.async_redis, sweep_id)
    except RedisError:
        return "0"


async def await_news(resources: Resources, sweep_id: str, after: str, seconds: float) -> str:
    """Wait for an event of one of the sweep's jobs, not for long; returns the stream id of the last one there is."""
    try:
        if await events.has_news(resources.async_redis, sweep_id, after, min(seconds, POLL_SECONDS)):
            await asyncio.sleep(min(seconds, PAUSE_SECONDS))  # others come with it
            return await events.newest(resources.async_redis, sweep_id)
    except RedisError:
        await asyncio.sleep(min(seconds, POLL_SECONDS / 4))
    return after


async def page(resources: Resources, tenant: str, limit: int, cursor: str | None) -> SweepPage:
    """One page of a tenant's sweeps, newest first."""
    before = None if cursor is None else read_cursor(cursor)
    found = await run_in_threadpool(list_sweeps, resources.database, tenant, limit=limit + 1, before=before)
    shown = found[:limit]
    return SweepPage(items=tuple(shown), next_cursor=cursor_after(shown, len(found)))


def rows_page(
    resources: Resources, sweep: Sweep, *, first: int, limit: int, status: JobStatus | None, results: bool
) -> SweepRows:
    """Rows in order; with `results`, what of their manifests fits into a table."""
    statuses = None if status is None else [status]
    found = list_rows(resources.database, sweep.id, first=first, limit=limit + 1, statuses=statuses)
    shown = found[:limit]
    rows = [row for row, _ in shown]
    if results:
        with ThreadPoolExecutor(_READERS) as readers:
            rows = list(readers.map(lambda item: _with_result(resources, *item), shown))
    return SweepRows(items=tuple(rows), next_row=found[limit][0].row if len(found) > limit else None)


def _with_result(resources: Resources, row: SweepRowView, attempt: int) -> SweepRowView:
    if row.status != JobStatus.SUCCEEDED:
        return row
    try:
        manifest = resources.objects.get_bytes(result_key(row.job_id, attempt, MANIFEST))
    except FileNotFoundError:  # an old result, removed
        return row
    return row.model_copy(update={"result": RowResult.model_validate_json(manifest)})


def cancel(resources: Resources, tenant: str, sweep_id: str) -> Sweep:
    """Ask all jobs to stop that are not over.

    Raises:
        ApiError: `sweep_not_found`.
    """
    return _told(resources, sweep_id, cancel_sweep(resources.database, sweep_id, tenant))


def retry(resources: Resources, tenant: str, sweep_id: str) -> Sweep:
    """Queue the failed and cancelled jobs once more.

    Raises:
        ApiError: `sweep_not_found`, `queue_full`; and for an upload that one of them needs and that was removed.
    """
    try:
        changed = retry_sweep(resources.database, sweep_id, tenant)
    except QueueFull as error:
        raise full(error) from error
    except ArtefactMissing as error:
        raise missing(error) from error
    sweep = _told(resources, sweep_id, changed)
    ring(resources, count_queued(resources.database, sweep_id))
    return sweep


def _told(resources: Resources, sweep_id: str, changed: Changed | None) -> Sweep:
    """The changed sweep, after those who follow its jobs over data sets were told; the others ask the database."""
    if changed is None:
        raise unknown(sweep_id)
    events.publish_all(resources.redis, changed.jobs)
    return changed.sweep
