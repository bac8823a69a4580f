"""`/v1/sweeps`."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sse_starlette import EventSourceResponse, ServerSentEvent

from curvature_protocol.events import JobEvent
from curvature_protocol.jobs import JobStatus
from curvature_protocol.sweeps import MOST_ROWS, Sweep, SweepPage, SweepRequest, SweepRows, SweepStates
from curvature_service import examples
from curvature_service.authentication import TenantDependency
from curvature_service.bodies import read_json
from curvature_service.events.endpoints import LastEventId, checked_event_id
from curvature_service.openapi import SweepIdPath, answer, json_body, problems
from curvature_service.resources import ResourcesDependency
from curvature_service.sweeps import service
from curvature_service.sweeps.following import follow_sweep
from curvature_service.sweeps.submission import MAX_BODY_BYTES, submit_sweep

router = APIRouter(prefix="/sweeps", tags=["sweeps"])

Wait = Annotated[float, Query(ge=0, description="seconds to wait for the end of all jobs, at most")]


async def read_sweep_request(request: Request) -> SweepRequest:
    """The body."""
    remedy = "what rows share stands once, in base; give a grid in place of rows, or make several sweeps"
    return await read_json(request, SweepRequest, MAX_BODY_BYTES, remedy)


@router.post(
    "",
    summary="Submit many jobs at once",
    description=f"A grid, or explicit rows; at most {MOST_ROWS} rows. All of them are accepted, or none: `param` says "
    "which row or value of an axis is at fault. They are taken up in their order.",
    status_code=201,
    responses={
        **answer(201, "Accepted", examples.SWEEP),
        **answer(200, "This idempotency key's sweep", examples.SWEEP, Sweep),
        **problems("model_not_found", "idempotency_conflict", "payload_too_large", "unknown_extension", "queue_full"),
    },
    openapi_extra=json_body(SweepRequest, examples.SWEEP_REQUESTS),
)
async def post_sweep(
    request: Request,
    response: Response,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    body: Annotated[SweepRequest, Depends(read_sweep_request)],
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="the same key and body: the same sweep")
    ] = None,
) -> Sweep:
    """Expand, validate, write all rows in one transaction, ring the bell."""
    catalogue = request.app.state.catalogue
    sweep, new = await run_in_threadpool(submit_sweep, resources, tenant, catalogue, body, idempotency_key)
    response.status_code = 201 if new else 200
    return sweep


@router.get(
    "",
    summary="List sweeps, newest first",
    responses={**answer(200, "One page", examples.SWEEP_PAGE), **problems("invalid_request")},
)
async def get_sweeps(
    resources: ResourcesDependency,
    tenant: TenantDependency,
    limit: Annotated[int, Query(ge=1, le=200, description="sweeps in a page")] = 50,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the previous page")] = None,
) -> SweepPage:
    """One page; `next_cursor` leads to the next, and is null in the last."""
    return await service.page(resources, tenant, limit, cursor)


@router.get(
    "/{sweep_id}",
    summary="One sweep",
    responses={**answer(200, "The sweep", examples.SWEEP), **problems("sweep_not_found")},
)
async def get_sweep(
    sweep_id: SweepIdPath, resources: ResourcesDependency, tenant: TenantDependency, wait: Wait = 0.0
) -> Sweep:
    """How many jobs are in which state."""
    sweep = await service.find_sweep(resources, tenant, sweep_id)
    if wait > 0 and not sweep.done:
        seconds = min(wait, resources.settings.max_wait_seconds)
        sweep = await service.wait_for(resources, tenant, sweep, seconds)
    return sweep


@router.get(
    "/{sweep_id}/rows",
    summary="A sweep's rows",
    description="In their order, with the coordinates and the job of each. With `results`, succeeded rows bring the "
    "loss and the timings of their manifests.",
    responses={**answer(200, "One page", examples.SWEEP_ROWS), **problems("sweep_not_found")},
)
async def get_rows(
    sweep_id: SweepIdPath,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    first: Annotated[int, Query(ge=0, le=MOST_ROWS, description="number of the page's first row")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="rows in a page")] = 200,
    status: Annotated[JobStatus | None, Query(description="only rows in this state")] = None,
    results: Annotated[bool, Query(description="with loss and timings of succeeded rows")] = False,
) -> SweepRows:
    """One page; `next_row` is the next one's `first`, and null in the last."""
    sweep = await service.find_sweep(resources, tenant, sweep_id)
    return await run_in_threadpool(
        service.rows_page, resources, sweep, first=first, limit=limit, status=status, results=results
    )


@router.get(
    "/{sweep_id}/states",
    summary="Where all rows of a sweep stand",
    description="A letter per row. With `finished` and `wait`, the answer comes as soon as another number of rows is "
    "over: whoever keeps the last answer sees from the two which rows ended, and misses none.",
    responses={**answer(200, "The states", examples.SWEEP_STATES), **problems("sweep_not_found")},
)
async def get_states(
    sweep_id: SweepIdPath,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    finished: Annotated[int | None, Query(ge=0, description="how many rows were over when you last looked")] = None,
    wait: Annotated[float, Query(ge=0, description="seconds to wait for another number, at most")] = 0.0,
) -> SweepStates:
    """In a few bytes, however many rows there are."""
    sweep = await service.find_sweep(resources, tenant, sweep_id)
    seconds = min(wait, resources.settings.max_wait_seconds)
    return await service.states_beyond(resources, tenant, sweep, finished, seconds)


@router.get(
    "/{sweep_id}/events",
    summary="A sweep's events as they happen",
    description="`event: state`, with a `JobEvent` of one of its jobs, and `event: counts`, with the `Sweep`, at most "
    "once a second; resumable by `Last-Event-ID`; ends with the counts after the last job's end. The server keeps the "
    "last thousand events or so: the counts, and `/states`, are complete.",
    response_class=EventSourceResponse,
    responses={
        200: {"description": "The stream", "content": {"text/event-stream": {"example": examples.SWEEP_EVENT_STREAM}}},
        **problems("sweep_not_found"),
    },
)
async def get_events(
    sweep_id: SweepIdPath,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    last_event_id: LastEventId = None,
    wait: Annotated[float | None, Query(ge=0, description="seconds after which the stream ends in any case")] = None,
) -> EventSourceResponse:
    """Follow one sweep."""
    after = checked_event_id(last_event_id)
    sweep = await service.find_sweep(resources, tenant, sweep_id)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        async for event_id, event in follow_sweep(resources, sweep, after, wait):
            name = event.event if isinstance(event, JobEvent) else "counts"
            yield ServerSentEvent(event.model_dump_json(), event=name, id=event_id)

    return EventSourceResponse(
        stream(), ping=resources.settings.heartbeat_seconds, headers={"Cache-Control": "no-store"}
    )


@router.post(
    "/{sweep_id}/cancel",
    summary="Cancel all jobs of a sweep that are not over",
    responses={**answer(200, "The sweep", examples.SWEEP), **problems("sweep_not_found")},
)
async def cancel_sweep(sweep_id: SweepIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Sweep:
    """Queued jobs are cancelled at once, running ones within two seconds; it is no error if all are over."""
    await service.find_sweep(resources, tenant, sweep_id)
    return await run_in_threadpool(service.cancel, resources, tenant, sweep_id)


@router.post(
    "/{sweep_id}/retry",
    summary="Queue the failed and cancelled jobs of a sweep once more",
    description="With all their attempts again; of a row over a data set, only the shards that have not succeeded.",
    responses={**answer(200, "The sweep", examples.SWEEP), **problems("sweep_not_found", "queue_full")},
)
async def retry_sweep(sweep_id: SweepIdPath, resources: ResourcesDependency, tenant: TenantDependency) -> Sweep:
    """It is no error if none has failed."""
    await service.find_sweep(resources, tenant, sweep_id)
    return await run_in_threadpool(service.retry, resources, tenant, sweep_id)
