"""The API's one error class and the one error body (RFC 9457 problem details).

ApiError                 any refusal, by its code; the code decides the status
RequestValidationError   FastAPI's, for bodies and parameters of the wrong form
HTTPException            Starlette's, for unknown paths and methods
database, Redis, store   503 `unavailable`: a part of the server does not answer
ClientDisconnect         nobody is left to be told
Exception                anything unforeseen: 500, logged with its traceback, told without
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from obstore.exceptions import BaseError as StoreError
from redis import RedisError
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from curvature_protocol.errors import Problem, status_of

logger = logging.getLogger("curvature.service")

MEDIA_TYPE = "application/problem+json"
DATABASE_AWAY = (OperationalError, InterfaceError, PoolTimeoutError)
"""What the database's drivers raise when it does not answer."""

_SHOWN_CHARACTERS = 100
_CLIENT_CLOSED_REQUEST = 499


class ApiError(Exception):
    """A refusal with a code of the protocol's list."""

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        remedy: str | None = None,
        status: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code, self.detail, self.param, self.remedy = code, detail, param, remedy
        self.status = status_of(code) if status is None else status
        self.headers = headers or {}


def install_handlers(app: FastAPI) -> None:
    """Give every failure the one body."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    # The store's failures are partly its own, partly the system's (a full disk).
    for away in (*DATABASE_AWAY, RedisError, StoreError, OSError):
        app.add_exception_handler(away, _unavailable)
    app.add_exception_handler(Exception, _unforeseen)


def _response(request: Request, error: ApiError) -> JSONResponse:
    request_id = getattr(request.state, "request_id", None)
    problem = Problem(
        title=error.code.replace("_", " ").capitalize(),
        status=error.status,
        detail=error.detail,
        code=error.code,
        param=error.param,
        remedy=error.remedy,
        request_id=request_id,
    )
    # A 500 is answered outside of the middleware that sets this header.
    headers = {**error.headers, **({"X-Request-ID": request_id} if request_id else {})}
    return JSONResponse(problem.model_dump(exclude_none=True), error.status, headers, MEDIA_TYPE)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _response(request, error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _response(request, invalid_form(error.errors(), error.body))


def invalid_form(errors: Sequence[Any], body: Any, origin: str | None = None) -> ApiError:
    """The refusal of a body of the wrong form.

    Args:
        errors: pydantic's.
        body: what it looked at.
        origin: where the field at fault came from, if that is elsewhere than in the body.
    """
    first = _most_telling(errors)
    parts = _parts(first["loc"], body)
    path = ".".join(parts if origin is None else [origin, *parts[1:]])
    message = str(first["msg"]).removeprefix("Value error, ")
    came = first.get("input")
    secret = first["loc"][-1:] == ("secret",)
    unshown = came is None or first["type"] == "missing" or isinstance(came, dict | list | bytes) or secret
    shown = "" if unshown else f"; got {str(came)[:_SHOWN_CHARACTERS]!r}"
    detail = f"{path}: {message}{shown}" if path else message
    return ApiError("invalid_request", detail, param=path or None, remedy="see /docs for the request's form")


def _most_telling(errors: Sequence[Any]) -> dict[str, Any]:
    """The error to tell: of the alternatives of a union, the one that the value fits best (has fewest errors in)."""
    places = Counter(error["loc"][:-1] for error in errors)
    chosen: dict[str, Any] = min(errors, key=lambda error: places[error["loc"][:-1]])
    return chosen


def _parts(location: Sequence[str | int], body: Any) -> list[str]:
    """The location as the caller knows it: pydantic puts in names of union members that are not in the body."""
    if location and location[0] in ("body", "query", "path", "header"):
        location = location[1:]
    if body is None:
        return [str(part) for part in location]
    parts = []
    for place, part in enumerate(location):
        last = place == len(location) - 1
        if isinstance(body, dict) and (part in body or last):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        else:
            continue
        parts.append(str(part))
    return parts


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "invalid_request"
    detail = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})
    remedy = "see /docs for the API's paths"
    return _response(request, ApiError(code, detail, remedy=remedy, status=error.status_code, headers=headers))


async def _client_gone(request: Request, error: Exception) -> Response:
    logger.info("%s %s: the client went away while sending", request.method, request.url.path)
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    database, broker = isinstance(error, DBAPIError | PoolTimeoutError), isinstance(error, RedisError)
    part = "database" if database else "broker" if broker else "object store"
    request_id = getattr(request.state, "request_id", None)
    logger.error("request %s: the %s does not answer: %s", request_id, part, error)
    detail = f"the server's {part} does not answer"
    return _response(request, ApiError("unavailable", detail, remedy="try again in a moment"))


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    request_id = getattr(request.state, "request_id", None)
    logger.error("request %s: %s %s failed", request_id, request.method, request.url.path, exc_info=error)
    detail = "the server failed; the operator finds the cause in its log by the request id"
    return _response(request, ApiError("internal_error", detail, remedy="try again; if it persists, tell the operator"))
