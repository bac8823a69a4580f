"""`/v1/jobs/{id}/events`: server-sent events."""

import re
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query
from sse_starlette import EventSourceResponse, ServerSentEvent

from curvature_service import examples
from curvature_service.authentication import TenantDependency
from curvature_service.errors import ApiError
from curvature_service.events.service import follow_job
from curvature_service.jobs.service import find_job
from curvature_service.openapi import JobIdPath, problems
from curvature_service.resources import ResourcesDependency

router = APIRouter(prefix="/jobs/{job_id}/events", tags=["jobs"])

_STREAM_ID = re.compile(r"[0-9]{1,18}(-[0-9]{1,18})?")

LastEventId = Annotated[str | None, Header(description="`id` of the last event seen")]


def checked_event_id(last_event_id: str | None) -> str:
    """The stream id after which events are wanted.

    Raises:
        ApiError: `invalid_request`, for what is no id of an event.
    """
    after = last_event_id or "0"
    if not _STREAM_ID.fullmatch(after):
        raise ApiError(
            "invalid_request",
            f"Last-Event-ID {after[:50]!r} is none of ours",
            param="Last-Event-ID",
            remedy="pass the id of an event that came from here, or none",
        )
    return after


@router.get(
    "",
    summary="A job's events as they happen",
    description="`event: state` and `event: progress`, each with a `JobEvent` as its data; resumable by "
    "`Last-Event-ID`; ends after the final state. A comment comes every few seconds when there is no news.",
    response_class=EventSourceResponse,
    responses={
        200: {"description": "The stream", "content": {"text/event-stream": {"example": examples.EVENT_STREAM}}},
        **problems("job_not_found"),
    },
)
async def job_events(
    job_id: JobIdPath,
    resources: ResourcesDependency,
    tenant: TenantDependency,
    last_event_id: LastEventId = None,
    wait: Annotated[float | None, Query(ge=0, description="seconds after which the stream ends in any case")] = None,
) -> EventSourceResponse:
    """Follow one job."""
    after = checked_event_id(last_event_id)
    await find_job(resources, tenant, job_id)

    async def stream() -> AsyncIterator[ServerSentEvent]:
        async for event_id, event in follow_job(resources, job_id, after, wait):
            yield ServerSentEvent(event.model_dump_json(), event=event.event, id=event_id)

    return EventSourceResponse(
        stream(), ping=resources.settings.heartbeat_seconds, headers={"Cache-Control": "no-store"}
    )
