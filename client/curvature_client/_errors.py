"""Everything that can go wrong, as one tree.

CurvatureError                         code, param, remedy, request_id
├── APIConnectionError                 no answer: nothing listens, or the connection broke
│   └── APITimeoutError                no answer in time
├── APIStatusError                     the server refused, or failed
│   ├── BadRequestError                400, 416
│   ├── AuthenticationError            401
│   ├── PermissionDeniedError          403
│   ├── NotFoundError                  404
│   ├── ConflictError                  409
│   ├── PayloadTooLargeError           413
│   ├── UnprocessableError             422  (also raised by the client itself for arguments it can judge)
│   ├── RateLimitError                 429
│   ├── InternalServerError            500
│   └── ServiceUnavailableError        502, 503, 504
├── JobError                           job_id
│   ├── JobFailed                      also an instance of the class of its code's family
│   └── JobCancelled
├── ModelConversionError               the module could be neither scripted nor traced
└── WaitTimeout                        the job was not finished in time (also a TimeoutError); it goes on

One mistake raises one family wherever it is noticed: `except UnprocessableError` catches targets out of range whether
the client, the API or the worker saw them.
"""

from typing import Any, ClassVar

import httpx

from curvature_protocol.errors import STATUS, ErrorFamily, Problem, family_of


class CurvatureError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: one word for the kind of mistake, stable across versions.
        param: the argument, field or parameter at fault, if one is.
        remedy: what to do about it.
        request_id: what the server's log knows the request by.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "error",
        param: str | None = None,
        remedy: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.remedy = remedy
        self.request_id = request_id

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments defeat the default, which passes `args` alone; errors cross process borders.
        return _restore, (type(self), self.args, self.__dict__)


class APIConnectionError(CurvatureError):
    """The server did not answer."""


class APITimeoutError(APIConnectionError):
    """The server did not answer in time."""


class APIStatusError(CurvatureError):
    """The server answered with an error.

    Attributes:
        status_code: of the reply (of the family, where nothing was sent).
        retry_after_seconds: how long the server asked to wait.
    """

    status_code: int = 500
    retry_after_seconds: float | None = None


class BadRequestError(APIStatusError):
    """The bytes are not what the request said (400)."""

    status_code = 400


class AuthenticationError(APIStatusError):
    """The API key is missing or unknown (401)."""

    status_code = 401


class PermissionDeniedError(APIStatusError):
    """The API key may not do this (403)."""

    status_code = 403


class NotFoundError(APIStatusError):
    """There is no such job, sweep, model, batch or result (404)."""

    status_code = 404


class ConflictError(APIStatusError):
    """The job's state does not allow this (409)."""

    status_code = 409


class PayloadTooLargeError(APIStatusError):
    """The upload exceeds the server's limit (413)."""

    status_code = 413


class UnprocessableError(APIStatusError):
    """The model, the batch, the loss or an extension does not fit (422)."""

    status_code = 422


class RateLimitError(APIStatusError):
    """Too many requests (429)."""

    status_code = 429


class InternalServerError(APIStatusError):
    """The server or its worker failed (500)."""

    status_code = 500


class ServiceUnavailableError(APIStatusError):
    """The server cannot work at the moment (503)."""

    status_code = 503


class JobError(CurvatureError):
    """A job has no result."""

    job_id: str | None = None


class JobFailed(JobError):
    """The job failed; `code`, `param` and `remedy` are those of the failure."""

    family: ClassVar[ErrorFamily | None] = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_failed, (self.family, self.args, self.__dict__)


class JobCancelled(JobError):
    """The job was cancelled."""


class ModelConversionError(CurvatureError):
    """The module could be neither exported nor scripted nor traced."""


class WaitTimeout(CurvatureError, TimeoutError):
    """The job, or the sweep, was not finished in time; it goes on."""

    job_id: str | None = None
    sweep_id: str | None = None


FAMILY_CLASSES: dict[ErrorFamily, type[APIStatusError]] = {
    ErrorFamily.BAD_REQUEST: BadRequestError,
    ErrorFamily.AUTHENTICATION: AuthenticationError,
    ErrorFamily.PERMISSION: PermissionDeniedError,
    ErrorFamily.NOT_FOUND: NotFoundError,
    ErrorFamily.CONFLICT: ConflictError,
    ErrorFamily.TOO_LARGE: PayloadTooLargeError,
    ErrorFamily.UNPROCESSABLE: UnprocessableError,
    ErrorFamily.RATE_LIMIT: RateLimitError,
    ErrorFamily.INTERNAL: InternalServerError,
    ErrorFamily.UNAVAILABLE: ServiceUnavailableError,
}

# Shown as plain "JobFailed" in tracebacks: the family is for `except`, not for reading.
_FAILED: dict[ErrorFamily, type[JobFailed]] = {
    family: type("JobFailed", (JobFailed, status_class), {"__module__": __name__, "family": family})
    for family, status_class in FAMILY_CLASSES.items()
}

_FAMILY_OF_STATUS = {status: family for family, status in STATUS.items()} | {
    416: ErrorFamily.BAD_REQUEST,
    502: ErrorFamily.UNAVAILABLE,
    504: ErrorFamily.UNAVAILABLE,
}


def status_error(status: int, problem: Problem | None, request_id: str | None = None) -> APIStatusError:
    """The exception for an error reply; `problem` is None where the reply had no problem details."""
    if problem is None:
        family = _FAMILY_OF_STATUS.get(status, ErrorFamily.INTERNAL if status >= 500 else ErrorFamily.BAD_REQUEST)
        phrase = httpx.codes.get_reason_phrase(status) or "unknown status"
        error = FAMILY_CLASSES[family](
            f"the server answered {status} ({phrase}) without an explanation",
            code=f"http_{status}",
            request_id=request_id,
        )
    else:
        error = FAMILY_CLASSES[_FAMILY_OF_STATUS.get(status, family_of(problem.code))](
            problem.detail or problem.title,
            code=problem.code,
            param=problem.param,
            remedy=problem.remedy,
            request_id=problem.request_id or request_id,
        )
    error.status_code = status
    return error


def job_failed(job_id: str, problem: Problem | None) -> JobFailed:
    """The exception for a failed job: an instance of `JobFailed` and of the class of its code's family."""
    problem = problem or Problem(title="failed", status=500, detail="the job failed", code="internal_error")
    error = _FAILED[family_of(problem.code)](
        problem.detail or problem.title,
        code=problem.code,
        param=problem.param,
        remedy=problem.remedy,
        request_id=problem.request_id,
    )
    error.job_id = job_id
    return error


def job_cancelled(job_id: str) -> JobCancelled:
    """The exception for a cancelled job."""
    error = JobCancelled(f"job {job_id} was cancelled", code="cancelled", remedy="submit it again")
    error.job_id = job_id
    return error


def refusal(code: str, message: str, *, param: str | None = None, remedy: str | None = None) -> APIStatusError:
    """The exception for an argument that the client itself can judge; nothing was sent."""
    return FAMILY_CLASSES[family_of(code)](message, code=code, param=param, remedy=remedy)


def _restore(kind: type[CurvatureError], args: tuple[Any, ...], state: dict[str, Any]) -> CurvatureError:
    error = kind(*args)
    error.__dict__.update(state)
    return error


def _restore_failed(family: ErrorFamily | None, args: tuple[Any, ...], state: dict[str, Any]) -> CurvatureError:
    return _restore(JobFailed if family is None else _FAILED[family], args, state)
