"""`/v1/jobs/{id}/events`: server-sent events."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from sse_starlette import EventSourceResponse, ServerSentEvent

from curvature_service.errors import ApiError
from curvature_service.events.service import follow_job
from curvature_service.jobs.service import find_job
from curvature_service.openapi import problems
from curvature_service.resources import ResourcesDependency

router = APIRouter(prefix="/jobs/{job_id}/events", tags=["jobs"])

_EXAMPLE = 'id: 1732380000000-0\nevent: progress\ndata: {"event": "progress", "job_id": "…", "status": "running"}\n\n'


@router.get(
    "",
    summary="A job's events as they happen",
    description="`event: state` and `event: progress`; resumable by `Last-Event-ID`; ends after the final state.",
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {"example": _EXAMPLE}}}, **problems(404)},
)
async def job_events(
    job_id: str, resources: ResourcesDependency, last_event_id: Annotated[str | None, Header()] = None
) -> EventSourceResponse:
    """Follow one job."""
    await find_job(resources, job_id)
    after = last_event_id or "0"
    if not all(part.isdigit() for part in after.split("-", 1)):
        raise ApiError("invalid_request", f"Last-Event-ID {after[:50]!r} is none of ours", param="Last-Event-ID")

    async def stream() -> AsyncIterator[ServerSentEvent]:
        async for event_id, event in follow_job(resources, job_id, after):
            yield ServerSentEvent(event.model_dump_json(), event=event.event, id=event_id)

    return EventSourceResponse(stream())
