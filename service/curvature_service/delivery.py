"""Stored bytes on their way to clients: from the store itself where it can sign addresses, else through the API."""

from typing import Annotated

from fastapi import Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response

from curvature_service.ranges import stream_object
from curvature_service.resources import Resources

ADDRESS_SECONDS = 900
"""How long an address of the store may be used; whoever comes later asks for another."""

Direct = Annotated[bool, Query(description="whether a redirect to the store itself will do; send no API key there")]


async def deliver_object(
    request: Request, resources: Resources, key: str, size: int, *, etag: str, direct: bool
) -> Response:
    """The object, a part of it, or the way to it."""
    if direct and resources.direct is not None and request.method == "GET":
        address = await run_in_threadpool(resources.direct.sign_download, key, ADDRESS_SECONDS)
        return RedirectResponse(address, 307, headers={"Cache-Control": "no-store"})
    return stream_object(request, resources.objects, key, size, etag=etag)
