"""Stored bytes as a streamed response, with single HTTP ranges (RFC 9110, section 14)."""

import re

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from curvature_service.errors import ApiError
from curvature_state import ObjectStore

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def stream_object(
    request: Request, objects: ObjectStore, key: str, size: int, *, etag: str, media_type: str
) -> Response:
    """The object, or the part of it that the request's `Range` asks for; several ranges at once give the whole."""
    headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Cache-Control": "private, immutable"}
    start, end, status = 0, size, 200
    wanted = _RANGE.fullmatch(request.headers.get("range", ""))
    if wanted and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        start, end = _bounds(wanted[1], wanted[2], size)
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(None, status, headers, media_type)
    return StreamingResponse(objects.async_stream(key, start, end), status, headers, media_type)


def _bounds(first: str, last: str, size: int) -> tuple[int, int]:
    if first:
        start, end = int(first), min(int(last) + 1 if last else size, size)
    else:  # the last so many bytes
        start, end = max(0, size - int(last or 0)), size
    if start >= end:
        raise ApiError(
            "range_not_satisfiable",
            f"the range lies outside the object's {size} bytes",
            status=416,
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end
