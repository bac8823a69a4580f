"""JSON request bodies, read up to a limit and parsed strictly.

FastAPI would hold a body of any size in memory before it looked at it, and read it before it asked for the key.
"""

import json
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from curvature_service.errors import ApiError

M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request, kind: type[M], limit_bytes: int, remedy: str) -> M:
    """The body as a message of `kind`.

    Raises:
        ApiError: `payload_too_large` with `remedy`, as soon as the limit is passed; `invalid_request` for no JSON.
        RequestValidationError: for JSON of another form.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise ApiError(
            "invalid_request",
            f"the body must be application/json; its Content-Type is {media_type or 'missing'}",
            param="Content-Type",
            remedy="send Content-Type: application/json",
        )
    data = _parse(await _read(request, limit_bytes, remedy))
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False), body=data) from error


async def _read(request: Request, limit_bytes: int, remedy: str) -> bytes:
    def refuse(came: str) -> NoReturn:
        raise ApiError("payload_too_large", f"the body may have {limit_bytes} bytes; {came} came", remedy=remedy)

    announced = request.headers.get("content-length")
    if announced is not None and int(announced) > limit_bytes:
        refuse(announced)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            refuse("more")
    return bytes(body)


def _parse(body: bytes) -> Any:
    try:
        data = json.loads(body, parse_constant=_refuse_number, parse_float=_finite)
        if b"\\ud" in body.lower():  # half a surrogate pair is a string in Python, but nowhere else
            json.dumps(data, ensure_ascii=False).encode()
        return data
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(
            "invalid_request", f"the body is no JSON: {reason[:200]}", remedy="see /docs for the request's form"
        ) from error


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        _refuse_number(digits)
    return number


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name[:20]} is no number that JSON knows")
