"""The API's one error class and the one error body (RFC 9457 problem details).

ApiError                 any refusal, by its code; the code decides the status
RequestValidationError   FastAPI's, for bodies and parameters of the wrong form
HTTPException            Starlette's, for unknown paths and methods
Exception                anything unforeseen: 500, logged with its traceback, told without
"""

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis import RedisError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from curvature_protocol.errors import Problem, status_of

logger = logging.getLogger("curvature.service")

MEDIA_TYPE = "application/problem+json"


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
    app.add_exception_handler(OperationalError, _unavailable)
    app.add_exception_handler(RedisError, _unavailable)
    app.add_exception_handler(Exception, _unforeseen)


def _response(
    request: Request,
    code: str,
    detail: str,
    status: int,
    *,
    param: str | None = None,
    remedy: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    problem = Problem(
        title=code.replace("_", " ").capitalize(),
        status=status,
        detail=detail,
        code=code,
        param=param,
        remedy=remedy,
        request_id=getattr(request.state, "request_id", None),
    )
    return JSONResponse(problem.model_dump(exclude_none=True), status, headers, MEDIA_TYPE)


async def _api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return _response(
        request,
        error.code,
        error.detail,
        error.status,
        param=error.param,
        remedy=error.remedy,
        headers=error.headers,
    )


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    message = str(first["msg"]).removeprefix("Value error, ")
    came = first.get("input")
    shown = "" if isinstance(came, dict | list | bytes) or came is None else f"; got {str(came)[:100]!r}"
    detail = f"{path}: {message}{shown}" if path else message
    return _response(
        request, "invalid_request", detail, 422, param=path or None, remedy="see /docs for the request's form"
    )


async def _http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code in (404, 405) else "invalid_request"
    detail = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})
    return _response(request, code, detail, error.status_code, remedy="see /docs for the API's paths", headers=headers)


async def _unavailable(request: Request, error: Exception) -> JSONResponse:
    logger.error("a part of the server does not answer: %s", error)
    return _response(
        request, "unavailable", "the server's database or broker does not answer", 503, remedy="try again in a moment"
    )


async def _unforeseen(request: Request, error: Exception) -> JSONResponse:
    logger.exception("unforeseen error in %s %s", request.method, request.url.path, exc_info=error)
    return _response(
        request, "internal_error", "the server failed; the operator finds the cause in its log by the request id", 500
    )
