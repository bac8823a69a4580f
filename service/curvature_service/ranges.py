"""Stored bytes as a streamed response, with single HTTP ranges (RFC 9110, section 14)."""

import re

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from curvature_service.errors import ApiError
from curvature_state import ObjectStore

MEDIA_TYPE = "application/octet-stream"

_RANGE = re.compile(r"bytes=(?:(?P<first>[0-9]+)-(?P<last>[0-9]*)|-(?P<suffix>[0-9]+))", re.IGNORECASE)
_MOST_DIGITS = 18


def stream_object(request: Request, objects: ObjectStore, key: str, size: int, *, etag: str) -> Response:
    """The object, or the part of it that the request's `Range` asks for.

    Several ranges at once, a malformed range, and a range whose `If-Range` names other bytes give the whole.
    """
    headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Cache-Control": "private, max-age=31536000, immutable"}
    start, end, status = 0, size, 200
    wanted = _read_range(request.headers.get("range", "")) if request.method == "GET" else None
    if wanted and request.headers.get("if-range", headers["ETag"]) == headers["ETag"]:
        start, end = _bounds(wanted, size)
        status = 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(None, status, headers, MEDIA_TYPE)
    return StreamingResponse(objects.async_stream(key, start, end), status, headers, MEDIA_TYPE)


def _read_range(header: str) -> re.Match[str] | None:
    wanted = _RANGE.fullmatch(header.strip())
    if wanted and wanted["last"] and _number(wanted["last"]) < _number(wanted["first"]):
        return None  # malformed
    return wanted


def _bounds(wanted: re.Match[str], size: int) -> tuple[int, int]:
    if wanted["suffix"] is not None:
        start, end = max(0, size - _number(wanted["suffix"])), size
    else:
        start = _number(wanted["first"])
        end = min(_number(wanted["last"]) + 1, size) if wanted["last"] else size
    if start >= end:
        raise ApiError(
            "range_not_satisfiable",
            f"the range {wanted[0][:60]} lies outside the object's {size} bytes",
            param="Range",
            remedy=f"ask for bytes within 0-{size - 1}" if size else "the object is empty",
            status=416,
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def _number(digits: str) -> int:
    """The number, or one beyond any size: Python refuses to read numbers of thousands of digits."""
    return int(digits) if len(digits) <= _MOST_DIGITS else 10**_MOST_DIGITS
